"""Fixtures of the trainer's tests: one thread for torch, one node for all tests that need data, and trainers' processes."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final

import pytest
import torch

from loader_service import LocalNode


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Limit torch to one thread: small tensors gain nothing from more, and sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def node(dataset_dir: Path) -> Iterator[str]:
    """Yield the address of a node that serves 300 training and 60 validation records of 3 classes."""
    with LocalNode(data=dataset_dir, workers=1) as running:
        yield running.address


IN_PROCESS: Final = """
import os, sys
import torch

os.environ.update(environ)
sys.argv = ["trainer", *arguments]
output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
torch.set_num_threads(1)
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
"""


class TrainerProcess:
    """A process that runs a program; see ``TrainerProcesses.start``."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self._process, self._log = process, log

    def wait(self, timeout_s: float = 100.0) -> tuple[int | None, str]:
        """Wait for its end; return its exit code, negative after a signal, and all that it printed.

        A process that still runs after ``timeout_s`` is killed, and its exit code is None.
        """
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        return code, self._log.read_text(encoding="utf-8") if self._log.exists() else ""


class TrainerProcesses:
    """Starts processes that have imported the trainer and torch already, since the imports take seconds of CPU time.

    A server without threads forks them, so they share no state with the process of the tests.
    """

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trainer.cli", "torch._dynamo", "pytest"])  # torch.optim imports _dynamo
        self._folder, self._started = folder, 0

    def start(self, program: str, *arguments: str | Path, environ: Mapping[str, str] | None = None) -> TrainerProcess:
        """Run Python source as the main module of a new process, with one thread, ``sys.argv`` and these variables."""
        self._started += 1
        log = self._folder / f"{self._started}.log"
        given = {"program": program, "arguments": list(map(str, arguments)), "environ": dict(environ or {})}
        # A builtin: the new process imports no file of the tests.
        process = self._context.Process(target=exec, args=(IN_PROCESS, given | {"log": str(log)}))
        process.start()
        return TrainerProcess(process, log)

    def together(
        self, count: int, program: str, *arguments: str | Path, environ: Mapping[str, str] | None = None
    ) -> list[tuple[int | None, str]]:
        """Run a program in ``count`` processes with the variables that torchrun sets; return codes and outputs by rank."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        everywhere = {**(environ or {}), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        running = [self.start(program, *arguments, environ=everywhere | rank) for rank in ranks]
        return [process.wait() for process in running]


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> TrainerProcesses:
    """Provide ``processes.start(program, *arguments)``, which takes milliseconds; see ``TrainerProcesses``."""
    return TrainerProcesses(tmp_path_factory.mktemp("processes"))
