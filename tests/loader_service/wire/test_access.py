"""Access: which keys an address takes, and how the user's own keys are made and checked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from loader_service import Loader, LocalNode, describe, errors, status
from loader_service.wire import auth
from loader_service.wire.access import Access, access, keys_to_serve, own_folder, own_keys

LOOPBACK = "tcp://127.0.0.1:5555"
REMOTE = "tcp://10.0.0.1:5555"
LAYOUT = {"node.secret", "node.key", "client.secret", "allowed", "allowed/client.key"}

needs_another_user = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a user without keys; return the folder in which they are made."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Keys that options name."""
    auth.generate(tmp_path / "named")
    return tmp_path / "named"


def contents(folder: Path) -> set[str]:
    """Return the paths of everything in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_node_and_client_find_the_same_keys(home: Path) -> None:
    """On loopback without options, the keys are made on first use, in a private folder, and fit together."""
    node = keys_to_serve(LOOPBACK)
    keys = access([LOOPBACK]).keys_for(LOOPBACK)
    assert node
    assert keys
    folder = home / "loader-service"
    assert contents(folder) == LAYOUT
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (keys.node, keys.folder) == (zmq.curve_public(node.secret), folder)
    assert zmq.curve_public(keys.secret) in node.allowed
    assert keys_to_serve(LOOPBACK) == node
    assert [path.name for path in home.iterdir()] == ["loader-service"]


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder is in $XDG_CONFIG_HOME, or else in ~/.config, also if the variable is empty or a relative path."""
    assert own_folder() == tmp_path / "config" / "loader-service"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert own_folder() == tmp_path / ".config" / "loader-service"


def test_named_keys_win(named: Path) -> None:
    """Keys of options are used for every address, also together with insecure, and none are made."""
    both: Any = {"server_key": named / "node.key", "client_key": named / "client.secret"}
    keys = auth.client_keys(**both)
    for address in (LOOPBACK, REMOTE, f"ipc://{named}/socket"):
        for insecure in (False, True):
            assert keys_to_serve(address, named, insecure=insecure) == auth.node_keys(named)
            assert access([address], **both, insecure=insecure).keys_for(address) == keys
    assert not own_folder().exists()


def test_no_keys_only_where_they_are_declined(tmp_path: Path) -> None:
    """Without keys, a TCP address needs ``insecure`` at both ends; ipc in a private folder needs nothing."""
    for address in (LOOPBACK, REMOTE):
        assert keys_to_serve(address, insecure=True) is None
        assert access([address], insecure=True) == Access(None, None)
    private = f"ipc://{tmp_path}/socket"
    assert keys_to_serve(private) is None
    assert access([private]) == Access(None, None)
    assert not own_folder().exists()
    with pytest.raises(errors.OptionError, match=r"keygen DIR.*--insecure"):
        keys_to_serve(REMOTE)
    with pytest.raises(errors.KeyRefused, match=r"10\.0\.0\.1:5555: .*server_key and client_key.*insecure=True"):
        access([LOOPBACK, REMOTE])
    for ask in (Loader, describe, status):
        with pytest.raises(errors.KeyRefused, match="insecure=True"):
            ask(REMOTE)


def test_an_address_behind_a_name_is_never_keyless() -> None:
    """A client of a node by ipc and one by TCP has no keys for the first, and never connects without to any other."""
    keys = access([LOOPBACK, "ipc:///nowhere/socket"])
    assert keys.keys_for("ipc:///nowhere/socket") is None
    assert keys.keys_for(REMOTE) == keys.keys_for(LOOPBACK) is not None


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o711])
def test_a_socket_that_others_can_reach_needs_keys(tmp_path: Path, mode: int) -> None:
    """An ipc address in a folder that others can open is refused at both ends, with the command that closes it."""
    tmp_path.chmod(mode)
    address = f"ipc://{tmp_path}/socket"
    with pytest.raises(errors.OptionError, match=rf"\(mode {mode:o}\); run `chmod 700 {tmp_path}`.*--keys.*--insecure"):
        keys_to_serve(address)
    with pytest.raises(errors.KeyRefused, match=f"chmod 700 {tmp_path}"):
        access([address])
    assert keys_to_serve(address, insecure=True) is access([address], insecure=True).ipc is None


def test_an_abstract_socket_needs_keys() -> None:
    """An ipc address outside of any folder is open to all users, so it is refused."""
    with pytest.raises(errors.OptionError, match="other users could connect"):
        keys_to_serve("ipc://@socket")


@needs_another_user
def test_a_socket_in_another_users_folder_is_refused(tmp_path: Path) -> None:
    """An ipc address in the folder of another user is refused at both ends, even if nobody else can open the folder."""
    os.chown(tmp_path, 12001, 12001)
    with pytest.raises(errors.OptionError, match=f"belongs to user 12001, not to user {os.geteuid()}"):
        keys_to_serve(f"ipc://{tmp_path}/socket")
    with pytest.raises(errors.KeyRefused, match="belongs to user 12001"):
        access([f"ipc://{tmp_path}/socket"])


def test_keys_that_others_can_change_are_refused() -> None:
    """A folder of keys that others can open or write to is refused at both ends, and the error says what to do."""
    folder = own_keys()
    for mode, found in ((0o777, "others can write to"), (0o755, "others can open")):
        folder.chmod(mode)
        for use in (lambda: keys_to_serve(LOOPBACK), lambda: access([LOOPBACK])):
            with pytest.raises(errors.KeyFileError, match=f"{found} .*chmod 700 {folder}`.*remove it"):
                use()


@needs_another_user
def test_keys_of_another_user_are_refused() -> None:
    """A folder of keys that another user owns is refused."""
    os.chown(own_keys(), 12001, 12001)
    with pytest.raises(errors.KeyFileError, match="belongs to user 12001"):
        own_keys()


def test_a_damaged_folder_names_its_remedy() -> None:
    """A key that is missing or readable by others is named, with the folder to remove; new keys are made after that."""
    folder = own_keys()
    (folder / "client.secret").chmod(0o644)
    with pytest.raises(
        errors.KeyFileError, match=rf"client\.secret cannot be used: others can read .*remove {folder}:"
    ):
        access([LOOPBACK])
    (folder / "node.secret").unlink()
    with pytest.raises(errors.KeyFileError, match=rf"node\.secret cannot be used.*remove {folder}: the next start"):
        keys_to_serve(LOOPBACK)


def test_an_empty_folder_is_filled(home: Path) -> None:
    """An empty folder counts as none: it is replaced by one with keys."""
    (home / "loader-service").mkdir(parents=True)
    assert contents(own_keys()) == LAYOUT


REFUSED = "set XDG_CONFIG_HOME to a folder that this user can write.*--keys DIR.*ipc address.*--insecure"


def _a_file(home: Path) -> None:
    home.touch()


def _a_folder_that_takes_no_files(home: Path) -> None:
    home.symlink_to("/proc/self")  # not even from root


@pytest.mark.parametrize("make", [_a_file, _a_folder_that_takes_no_files])
def test_a_start_without_a_home_is_refused(home: Path, dataset_dir: Path, make: Callable[[Path], None]) -> None:
    """If the keys cannot be made, `loader-service start` ends with one sentence that says what to do."""
    make(home)
    with pytest.raises(errors.NodeFailed, match=REFUSED):
        LocalNode(dataset_dir, 1, bind="tcp://127.0.0.1:*")
    with pytest.raises(errors.KeyFileError, match=REFUSED):
        access([LOOPBACK])


def test_a_user_without_an_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in some containers, gets the same sentence."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(errors.KeyFileError, match=f"no home directory; {REFUSED}"):
        own_keys()


def _fork(child: Callable[[], None]) -> int:
    """Run a function in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    return pid


def test_many_processes_at_once_agree(home: Path) -> None:
    """Of processes that need the keys at the same moment, one makes them and all use these; nothing else is left."""
    gate, opener = os.pipe()
    answers, answer = os.pipe()

    def child() -> None:
        os.close(opener)
        os.read(gate, 1)  # returns in all processes at once, when the parent closes its end
        node, keys = keys_to_serve(LOOPBACK), access([LOOPBACK]).tcp
        assert node
        assert keys
        os.write(answer, node.secret + keys.secret)
        os._exit(0)

    children = [_fork(child) for _ in range(24)]
    os.close(gate)
    os.close(opener)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
    os.close(answer)
    with os.fdopen(answers, "rb") as file:
        said = file.read()
    size = 2 * auth.KEY_CHARACTERS
    assert len({said[at : at + size] for at in range(0, len(said), size)}) == 1
    assert len(said) == size * len(children)
    assert contents(home) == {"loader-service", *(f"loader-service/{name}" for name in LAYOUT)}


@pytest.mark.parametrize("files", [1, 2, 3, 4])
def test_a_kill_leaves_no_half_made_folder(home: Path, files: int) -> None:
    """A process that is killed while it makes the keys leaves no folder of keys, and the next process makes them."""
    written = 0
    fsync = os.fsync

    def fsync_and_die(descriptor: int) -> None:
        nonlocal written
        fsync(descriptor)
        written += 1
        if written == files:
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        os.fsync = fsync_and_die  # only in the forked process
        own_keys()

    _, status_of_child = os.waitpid(_fork(child), 0)
    assert os.waitstatus_to_exitcode(status_of_child) == -signal.SIGKILL
    assert len([path for path in home.rglob("*") if path.is_file()]) == files
    assert not own_folder().exists()
    assert contents(own_keys()) == LAYOUT
    assert access([LOOPBACK]).tcp
