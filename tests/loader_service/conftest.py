"""Nodes as a user starts them, as real processes, and what to look at when they are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import simplejpeg

from loader_service import LocalNode
from loader_service.wire.shm import DIRECTORY

WAIT_S = 20.0


def segments_of(pid: int) -> set[Path]:
    """The segments in /dev/shm that a process has open."""
    open_now = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            open_now.add(descriptor.stat().st_ino)
    return {path for path in DIRECTORY.glob("loader-service-*") if path.stat().st_ino in open_now}


class Node:
    """A node started by the command line."""

    def __init__(self, data: Path, workers: int, bind: str, options: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "loader_service", "start", "--data", str(data), "--workers", str(workers)]
        self.process = subprocess.Popen(
            [*command, "--bind", bind, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.announcement = self.process.stdout.readline()
        self.address = self.announcement.removeprefix("listening on ").partition(": ")[0]

    @property
    def family(self) -> list[psutil.Process]:
        """The dispatcher and all its descendants."""
        dispatcher = psutil.Process(self.process.pid)
        return [dispatcher, *dispatcher.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The processes that nobody was forked from: the workers."""
        return [process for process in self.family[1:] if not process.children()]

    def segments(self) -> set[Path]:
        """The segments that the dispatcher has open."""
        return segments_of(self.process.pid)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal the dispatcher; its exit code and what it said on standard error."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        _, said = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, said


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        os.sched_yield()


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[[Callable[[], bool], str], None]:
    """``eventually(condition, what)`` waits until the condition holds."""
    return eventually


@pytest.fixture
def my_segments() -> Callable[[], set[Path]]:
    """``my_segments()``: the segments in /dev/shm that this process has open; others' do not disturb."""
    return lambda: segments_of(os.getpid())


@pytest.fixture
def start_node(dataset_dir: Path) -> Iterator[Callable[..., Node]]:
    """``start_node(workers=1, data=..., bind=...)`` runs ``loader-service start`` and waits until it listens."""
    nodes: list[Node] = []

    def start(
        workers: int = 1, data: Path = dataset_dir, bind: str = "tcp://127.0.0.1:*", options: tuple[str, ...] = ()
    ) -> Node:
        nodes.append(Node(data, workers, bind, options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop(signal.SIGKILL)


@pytest.fixture
def other_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, this process decodes a JPEG's last pixel otherwise, by one grey level."""
    true = simplejpeg.decode_jpeg

    def decode(*args: Any, **options: Any) -> Any:
        pixels = true(*args, **options)
        pixels[-1, -1, -1] ^= 1
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)


@pytest.fixture(scope="session")
def node_address(dataset_dir: Path) -> Iterator[str]:
    """A node with two workers on ``dataset_dir``, for tests that do it no harm."""
    with LocalNode(dataset_dir, workers=2) as node:
        yield node.address
