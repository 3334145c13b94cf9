"""LocalNode: a node that only its starter uses, and that ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
