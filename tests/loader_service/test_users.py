"""Two users of one machine: what one runs at loopback addresses is closed to the other.

Root plays both, in forked processes that become unprivileged users for good.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from loader_service import Loader, status
from loader_service.node.dispatcher import run_node
from loader_service.node.worker import die_with_parent
from loader_service.wire import auth, messages, shm, sockets
from loader_service.wire.access import own_keys
from tests.conftest import MakeDataset

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")

OWNER, OTHER = 12001, 12002
SAMPLES = 300


class User:
    """A user with a home directory of mode 0700 and without privileges."""

    def __init__(self, uid: int, homes: Path) -> None:
        self.uid, self.home = uid, homes / str(uid)
        self.home.mkdir(mode=0o700)
        os.chown(self.home, uid, uid)

    @property
    def keys(self) -> Path:
        """The folder of the user's own keys."""
        return self.home / ".config" / "loader-service"

    def start(self, run: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
        """Run a function as the user, in another process; return its pid and a descriptor to read what it says."""
        heard, said = os.pipe()
        root = os.getpid()
        pid = os.fork()
        if pid:
            os.close(said)
            return pid, heard
        try:
            os.close(heard)
            os.setgroups([])
            os.setgid(self.uid)
            os.setuid(self.uid)
            die_with_parent(root)
            os.environ["HOME"] = str(self.home)
            os.environ.pop("XDG_CONFIG_HOME", None)
            os.chdir("/")
            run(lambda result: os.write(said, msgspec.json.encode(result) + b"\n") and None)
            os._exit(0)
        except Exception as error:
            os.write(said, msgspec.json.encode([type(error).__name__, str(error)]) + b"\n")
        finally:
            os._exit(1)

    def ask(self, run: Callable[[], Any]) -> Any:
        """Run a function as the user; return its result, or the name and the sentence of its error."""
        pid, heard = self.start(lambda say: say(run()))
        with os.fdopen(heard, "rb") as file:
            result = msgspec.json.decode(file.read())
        os.waitpid(pid, 0)
        return result

    @contextmanager
    def node(self, data: Path, bind: str) -> Iterator[str]:
        """Run a node as the user; yield its address."""
        pid, heard = self.start(
            lambda say: run_node(
                data, workers=1, bind=bind, version="test", on_ready=lambda dispatcher, _: say(dispatcher.address)
            )
        )
        with os.fdopen(heard, "rb") as file:
            address = msgspec.json.decode(file.readline())
            assert isinstance(address, str), address
            try:
                yield address
            finally:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def place(make_dataset: MakeDataset) -> Iterator[Path]:
    """A folder that every user can enter, with a dataset; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp(prefix="loader-service-users-"))
    folder.chmod(0o755)
    make_dataset(folder / "data" / "train.lmdb", SAMPLES)
    for path in (folder / "data").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for codec in ("ascii", "idna"):
        codecs.lookup(codec)  # loads its module now: the users may not be able to read root's files
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def users(place: Path) -> tuple[User, User]:
    """The user who runs a node, and another one."""
    return User(OWNER, place), User(OTHER, place)


@pytest.fixture(scope="module")
def address(users: tuple[User, User], place: Path) -> Iterator[str]:
    """The address of a node that the first user runs with the default keys."""
    with users[0].node(place / "data", "tcp://127.0.0.1:*") as running:
        yield running


def _epoch(address: str, **options: Any) -> list[Any]:
    with Loader(address, batch_size=50, **{"timeout_s": 20, **options}) as loader:
        samples = sum(len(batch.labels) for batch in loader)
    return [samples, os.geteuid()]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_user_of_a_node_is_served(users: tuple[User, User], address: str, transport: str) -> None:
    """Node and client of one user find their keys by themselves, and share memory."""
    assert users[0].ask(lambda: _epoch(address, transport=transport)) == [SAMPLES, OWNER]
    assert {path.stat().st_uid for path in (users[0].keys, *users[0].keys.rglob("*"))} == {OWNER}


def test_another_user_cannot_connect(users: tuple[User, User], address: str) -> None:
    """Another user's client refuses the node, and the node refuses a client without its keys or without any."""
    for ask in (lambda: _epoch(address), lambda: status(address)):
        kind, sentence = users[1].ask(ask)
        assert kind == "KeyRefused"
        assert f"does not prove this user's key ({users[1].keys}/node.key): it belongs to another user" in sentence
    kind, sentence = users[1].ask(lambda: _epoch(address, insecure=True))
    assert (kind, "the node demands keys" in sentence) == ("KeyRefused", True)


def test_another_user_cannot_use_the_keys(users: tuple[User, User], address: str) -> None:
    """Another user can neither read a key nor list the folder, and is refused if the folder is named to be their own."""
    assert address
    owner, other = users
    for name in ("", "node.secret", "node.key", "client.secret", "allowed/client.key"):
        path = owner.keys / name
        assert path.exists()
        kind, _ = other.ask(lambda path=path: path.read_text() if path.is_file() else [*map(str, path.iterdir())])
        assert kind == "PermissionError"

    def pretend() -> str:
        os.environ["XDG_CONFIG_HOME"] = str(owner.keys.parent)
        return str(own_keys())

    kind, sentence = other.ask(pretend)
    assert (kind, "set XDG_CONFIG_HOME" in sentence) == ("KeyFileError", True)
    # Root may read them, but does not take them for its own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(owner.keys.parent))
        with pytest.raises(Exception, match=f"belongs to user {OWNER}, not to user 0"):
            own_keys()


def test_another_user_cannot_make_a_node_write(users: tuple[User, User], address: str) -> None:
    """A node writes nothing for another user, even one who knows its public key and the names of all segments."""
    owner, other = users
    node_key = (owner.keys / "node.key").read_text().splitlines()[-1].encode()

    def attack(segment: str) -> list[bool]:
        """Ask for everything that leads to a write; return whether any answer came, and whether the segment opened."""
        context: zmq.Context[Any] = zmq.Context()
        answered = False
        for keys in (auth.ClientKeys(zmq.curve_keypair()[1], node_key), None):
            dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            sockets._prepare(dealer, address)
            if keys:
                auth.secure_client(dealer, keys)
            dealer.connect(address)
            for message in (messages.Hello(messages.PROTOCOL, "other"), messages.StatusQuery()):
                dealer.send(messages.encode(message))
            answered |= bool(dealer.poll(500))
            dealer.close(linger=0)
        context.term()
        try:
            os.close(os.open(shm.DIRECTORY / segment.removeprefix("/"), os.O_RDWR))
        except PermissionError:
            return [answered, False]
        return [answered, True]

    def hold(say: Callable[[Any], None]) -> None:
        with Loader(address, batch_size=50, transport="shm", timeout_s=20) as loader:
            held = [next(loader.all_epochs()) for _ in range(3)]
            before = [hashlib.sha256(batch.images).hexdigest() for batch in held]
            say(loader._buffers.segment.name)
            signal.sigwait({signal.SIGUSR1})
            say(before == [hashlib.sha256(batch.images).hexdigest() for batch in held])

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # inherited: it waits for sigwait
    try:
        pid, heard = owner.start(hold)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    with os.fdopen(heard, "rb") as file:
        segment = msgspec.json.decode(file.readline())
        assert isinstance(segment, str), segment
        found = shm.DIRECTORY / segment.removeprefix("/")
        assert (found.stat().st_uid, stat.S_IMODE(found.stat().st_mode)) == (OWNER, 0o600)
        assert other.ask(lambda: attack(segment)) == [False, False]
        os.kill(pid, signal.SIGUSR1)
        assert msgspec.json.decode(file.readline()) is True
    os.waitpid(pid, 0)
    assert owner.ask(lambda: len(status(address).clients)) == 0


def test_another_user_cannot_reach_a_private_socket(users: tuple[User, User], place: Path) -> None:
    """A node without keys in a folder of mode 0700 serves its user; another user cannot reach its socket."""
    owner, other = users
    folder = owner.home / "run"
    owner.ask(lambda: folder.mkdir(mode=0o700))
    with owner.node(place / "data", f"ipc://{folder}/node") as address:
        assert owner.ask(lambda: _epoch(address)) == [SAMPLES, OWNER]
        kind, sentence = other.ask(lambda: _epoch(address, insecure=True, timeout_s=1))
        assert kind == "NoNodeError", sentence
