"""LocalNode: a node that only its starter uses, and that ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from loader_service import LocalNode, errors, status
from loader_service.local_node import start_command
from loader_service.wire.auth import generate

PROGRAM = """
import signal, sys
from loader_service import LocalNode
node = LocalNode(sys.argv[1], 1)
print(node.pid, flush=True)
signal.pause()
"""


def test_options_from_outside_do_not_apply(dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and configuration files are for the node that a user starts, and would break this one."""
    monkeypatch.setenv("LOADER_SERVICE_START_METRICS", "nonsense")
    monkeypatch.setenv("LOADER_SERVICE_CONFIG", "/nowhere.toml")
    monkeypatch.chdir(tmp_path)
    Path("loader-service.toml").write_text("[start]\nwrokers = 1\n", encoding="utf-8")
    with LocalNode(dataset_dir, workers=1) as node:
        assert len(status(node.address).workers) == 1


def test_a_chosen_port_is_announced(dataset_dir: Path) -> None:
    """``address`` has the port that the node chose, and the announcement lists the splits."""
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*") as node:
        assert node.announcement.startswith(f"listening on {node.address}: train (")
        assert status(node.address).address == node.address


def test_a_node_with_keys_answers_its_clients_alone(dataset_dir: Path, tmp_path: Path) -> None:
    """Keys reach the node: a client needs the node's public key and its own listed one."""
    generate(tmp_path)
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*", keys=tmp_path) as node:
        keys = {"server_key": tmp_path / "node.key", "client_key": tmp_path / "client.secret"}
        assert len(status(node.address, **keys).workers) == 1


def test_options_and_log_are_the_callers(dataset_dir: Path, tmp_path: Path) -> None:
    """Options reach the command, and the log file receives every line, also those below warnings."""
    options, log = ("--metrics", "127.0.0.1:0"), tmp_path / "log"
    with LocalNode(dataset_dir, workers=1, options=options, log=log):
        pass
    assert "serving metrics at http://" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("log", [None, "log"])
def test_a_node_that_cannot_start_is_quoted(tmp_path: Path, log: str | None) -> None:
    """The error has the node's own sentence, whether its log goes to a file or not."""
    with pytest.raises(errors.NodeFailed, match=r"it could not start: .*there is no dataset at"):
        LocalNode(tmp_path, workers=1, log=log and tmp_path / log)


def test_a_program_that_is_no_node_is_refused() -> None:
    """A first line that announces no address is quoted in the error."""
    with pytest.raises(errors.NodeFailed, match="it could not start: hello"):
        LocalNode(program=(sys.executable, "-c", "print('hello')"))


def test_a_killed_node_is_gone(dataset_dir: Path) -> None:
    """``kill`` ends the dispatcher by SIGKILL and its workers with it; closing it again does no harm."""
    with LocalNode(dataset_dir, workers=1) as node:
        assert node.exit_code is None
        family = psutil.Process(node.pid).children(recursive=True)
        node.kill()
        assert node.exit_code == -signal.SIGKILL
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_node_dies_with_its_starter(dataset_dir: Path, eventually: Callable[[Callable[[], bool], str], None]) -> None:
    """A starter that is killed leaves no node behind; Ctrl-C in its terminal does not reach the node."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, dataset_dir], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert os.getsid(pid) == pid
        starter.kill()
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it ends")


IN_A_THREAD = """
import sys, threading
from loader_service import LocalNode, status
nodes = []
thread = threading.Thread(target=lambda: nodes.append(LocalNode(sys.argv[1], 1)))
thread.start()
thread.join()
status(nodes[0].address)
print(nodes[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_node_survives_the_thread_that_made_it(dataset_dir: Path) -> None:
    """A node that was made in a short-lived thread goes on when the thread has ended, also one made in a forked process."""
    nodes: list[LocalNode] = []

    def serve_and_end() -> None:
        thread = threading.Thread(target=lambda: nodes.append(LocalNode(dataset_dir, 1)))
        thread.start()
        thread.join()

    serve_and_end()
    with nodes.pop() as node:
        assert len(status(node.address).workers) == 1
        assert node.exit_code is None
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            serve_and_end()
            with nodes.pop() as node:
                code = 0 if len(status(node.address).workers) == 1 and node.exit_code is None else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_node_of_a_thread_dies_with_its_starter(
    dataset_dir: Path, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """A node whose thread has ended is still killed with the process, by SIGKILL."""
    command = [sys.executable, "-c", IN_A_THREAD, dataset_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it ends")


def test_a_long_temporary_folder(dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the path of the temporary folder is too long for a socket, a private folder elsewhere is used, and removed."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long / "missing"))
    with LocalNode(dataset_dir, workers=1) as node:
        folder = Path(node.address.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(status(node.address).workers) == 1
    assert not folder.exists()
    assert list(long.iterdir()) == []


def test_no_folder_for_a_socket(dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any folder for its socket, the error says what to set; a path that is too long is named where it is given."""
    monkeypatch.setattr(tempfile, "mkdtemp", _no_folder)
    with pytest.raises(errors.NodeFailed, match="set TMPDIR to a folder with a short path"):
        LocalNode(dataset_dir, workers=1)
    with pytest.raises(
        errors.NodeFailed, match="longer than the 107 bytes that a socket may have; choose a shorter one"
    ):
        LocalNode(dataset_dir, workers=1, bind=f"ipc://{tmp_path}/{'x' * 100}/node")


def _no_folder(**_: Any) -> Any:
    raise PermissionError("no folder")


def test_the_command_is_what_a_user_types() -> None:
    """``start_command`` has the options of the command line and none of the hidden ones."""
    command = start_command("data", 2, "tcp://127.0.0.1:5555", options=("--insecure",))
    words = "loader-service start --workers 2 --data data --bind tcp://127.0.0.1:5555 --insecure"
    assert command == words.split()


FORKING = """
import os, sys
from loader_service import LocalNode, status
node = LocalNode(sys.argv[1], workers=1)
child = os.fork()
if child == 0:
    sys.exit()  # runs finalisers and exit handlers
os.waitpid(child, 0)
assert status(node.address).clients == ()  # a new connection
folder = os.path.dirname(node.address.removeprefix("ipc://"))
assert os.path.isdir(folder)
node.close()
assert not os.path.exists(folder)
"""


def test_a_forked_child_that_ends_leaves_the_nodes_socket_alone(dataset_dir: Path) -> None:
    """The folder of the socket goes with its LocalNode, never with a forked child."""
    made = subprocess.run(
        [sys.executable, "-c", FORKING, str(dataset_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
