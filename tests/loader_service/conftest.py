"""Fixtures that start real nodes, and helpers that look at their processes and shared memory."""

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
import zmq

from loader_service import LocalNode
from loader_service.local_node import PROGRAM
from loader_service.wire import messages
from loader_service.wire.access import access
from loader_service.wire.auth import secure_client
from loader_service.wire.shm import DIRECTORY, PAGE_BYTES

WAIT_S = 20.0


def segments_of(pid: int) -> set[Path]:
    """Return the segments in /dev/shm that a process has open."""
    open_now = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            open_now.add(descriptor.stat().st_ino)
    return {path for path in DIRECTORY.glob("loader-service-*") if path.stat().st_ino in open_now}


def locked_parts(segment: Path) -> list[int]:
    """Return the offsets of a segment's parts that a writer has locked, read from /proc/locks."""
    inode = segment.stat().st_ino
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(r[6]) for r in rows if r[1] == "OFDLCK" and int(r[5].rpartition(":")[2]) == inode and int(r[6]) >= PAGE_BYTES]  # fmt: skip


class Node(LocalNode):
    """A node under test, with a log of its own, that can be signalled and looked into."""

    def __init__(
        self, data: Path, workers: int, bind: str, options: tuple[str, ...], program: tuple[str, ...], log: Path
    ) -> None:
        self._log = log
        super().__init__(data, workers, bind=bind, options=options, log=log, program=program)

    @property
    def process(self) -> subprocess.Popen[str]:
        """The dispatcher's process."""
        return self._process

    @property
    def family(self) -> list[psutil.Process]:
        """The dispatcher and all its descendants."""
        dispatcher = psutil.Process(self.pid)
        return [dispatcher, *dispatcher.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The worker processes: the family without the dispatcher and the fork server, which has children."""
        return [process for process in self.family[1:] if not process.children()]

    def segments(self) -> set[Path]:
        """The segments that the dispatcher has open."""
        return segments_of(self.pid)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal the dispatcher; return its exit code and its log."""
        if self.exit_code is None:
            os.kill(self.pid, number)
        code = self.process.wait(WAIT_S)
        return code, self._log.read_text(encoding="utf-8")


class Client:
    """A client that sends single messages."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        keys = access([address]).keys_for(address)
        if keys:
            secure_client(self._dealer, keys)
        self._dealer.connect(address)

    def send(self, message: messages.FromClient) -> None:
        """Send a message."""
        self._dealer.send(messages.encode(message))

    def receive(self) -> messages.FromNode:
        """Return the next message."""
        assert self._dealer.poll(WAIT_S * 1000), "no answer"
        return messages.decode_from_node(self._dealer.recv_multipart()[0])

    @property
    def answered(self) -> bool:
        """True if a message has arrived."""
        return bool(self._dealer.poll(0))

    def ask(self, message: messages.FromClient) -> messages.FromNode:
        """Send a message and return the answer."""
        self.send(message)
        return self.receive()

    def close(self) -> None:
        """Close the connection."""
        self._dealer.close(linger=0)
        self._context.term()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fail with ``what`` after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        os.sched_yield()


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[[Callable[[], bool], str], None]:
    """``eventually(condition, what)`` waits until the condition holds."""
    return eventually


@pytest.fixture
def connect() -> Iterator[Callable[[str], Client]]:
    """``connect(address)`` returns a client that sends single messages."""
    clients: list[Client] = []

    def made(address: str) -> Client:
        clients.append(Client(address))
        return clients[-1]

    yield made
    for client in clients:
        client.close()


@pytest.fixture
def run_with_own_shm() -> Callable[..., str]:
    """``run_with_own_shm(script, *arguments, mount=...)`` runs Python with a /dev/shm of its own, and returns its output.

    The mount namespace also keeps the segments of other programs out of what the script measures. ``mount`` is a shell command
    that mounts it. The test is skipped if this user may not mount.
    """
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]

    def run(script: str, *arguments: str, mount: str = "mount -t tmpfs -o size=1g tmpfs /dev/shm") -> str:
        shell = [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh"]
        allowed = subprocess.run([*shell, "true"], capture_output=True, text=True, check=False)
        if allowed.returncode:
            pytest.skip(f"no mount namespace here: {allowed.stderr.strip()}")
        made = subprocess.run(
            [*shell, sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert made.returncode == 0, made.stderr
        return made.stdout + made.stderr

    return run


@pytest.fixture(name="locked_parts")
def locked_parts_fixture() -> Callable[[Path], list[int]]:
    """``locked_parts(segment)`` returns the offsets of a segment's parts that a writer has locked."""
    return locked_parts


@pytest.fixture
def my_segments() -> Callable[[], set[Path]]:
    """``my_segments()`` returns the segments in /dev/shm that this process has open."""
    return lambda: segments_of(os.getpid())


@pytest.fixture
def start_node(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Node]]:
    """``start_node(workers=1, data=..., bind=...)`` runs ``loader-service start`` and waits until it listens."""
    nodes: list[Node] = []

    def start(
        workers: int = 1,
        data: Path = dataset_dir,
        bind: str = "tcp://127.0.0.1:*",
        options: tuple[str, ...] = (),
        program: tuple[str, ...] = PROGRAM,
    ) -> Node:
        log = tmp_path_factory.mktemp("node") / "log"
        nodes.append(Node(data, workers, bind, options, program, log))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop(signal.SIGKILL)
        node.close()


@pytest.fixture
def other_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a JPEG's last pixel by one grey level when this process decodes it, until the test ends."""
    true = simplejpeg.decode_jpeg

    def decode(*args: Any, **options: Any) -> Any:
        pixels = true(*args, **options)
        pixels[-1, -1, -1] ^= 1
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)


@pytest.fixture(scope="session")
def node_address(dataset_dir: Path) -> Iterator[str]:
    """The address of a node with two workers on ``dataset_dir``, for tests that leave it intact."""
    with LocalNode(dataset_dir, workers=2) as node:
        yield node.address
