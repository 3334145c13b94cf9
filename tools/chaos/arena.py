"""Where the faults happen: nodes behind links, and the clients that train from all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from types import TracebackType

from loader_service.wire.auth import generate
from tools.chaos import processes
from tools.chaos.client import read_saved
from tools.chaos.link import Links
from tools.chaos.names import NAME, Names
from tools.chaos.node import Node, common_port
from tools.errors import ToolFailed

FIRST_NODES = 4
"""Enough for the three longest faults of a node at once, with one left to go on."""

ALL_NODES = 8
"""Addresses that the clients know from the beginning; at those beyond the first, nodes appear in the course of the run."""


class Client:
    """A client's process, its journal and its saved state."""

    def __init__(self, transport: str, addresses: str, seed: int, folder: Path, names: Path, keys: Path | None) -> None:
        self.name, self.seed, self.folder = f"client-{transport}", seed, folder / f"client-{transport}"
        self._command = [sys.executable, "-m", "tools.chaos.client", addresses, transport, str(seed)]
        self._command += [str(self.folder), "--names", str(names), *(["--keys", str(keys)] if keys else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []
        self.away = False  # killed by a fault, and not back yet

    def start(self) -> None:
        """Begin, or go on from the saved state."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        self.sessions.append(self._process.pid)
        self.away = False

    def batches(self) -> int:
        """How many batches its saved state has seen."""
        saved = read_saved(self.folder)
        return saved.lines if saved else 0

    def kill(self) -> bool:
        """SIGKILL it; False if it was not there."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        self._process.wait()
        self.away = True
        return True

    def check(self) -> None:
        """See that it lives.

        Raises:
            ToolFailed: it ended by itself.
        """
        if not self.away and self._process and self._process.poll() is not None:
            said = (self.folder / "log").read_text().strip().splitlines()
            raise ToolFailed(f"{self.name} ended by itself: {said[-1] if said else self._process.returncode}.")

    def finish(self, patience_s: float) -> None:
        """Let it end its epoch.

        Raises:
            ToolFailed: it hangs, or ended in another way.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise ToolFailed(
                f"{self.name} did not end its epoch in {patience_s:.0f} s, with every fault over."
            ) from None
        self.away = self._process.returncode == 0
        self.check()

    def segments(self) -> set[Path]:
        """The segments that it has open."""
        return processes.segments_of(self._process.pid) if self._process else set()


class Arena:
    """Nodes and clients of one run; a context manager that leaves no process, however it is left.

    One client knows the nodes' addresses, those where there is nobody yet too, and shares memory with them; the other
    knows a name, and gets frames.

    Args:
        data: what is served.
        folder: for logs, journals and states.
        rng: draws the clients' seeds.
        curve: whether nodes and clients have keys.
    """

    def __init__(self, data: Path, folder: Path, rng: Random, *, curve: bool) -> None:
        self.links = Links()
        self._data, self._folder, self._rng = data, folder, rng
        self._keys = folder / "keys" if curve else None
        self._name_file = folder / "names"
        self.names = Names(self._name_file)
        self.nodes: list[Node] = []
        self.clients: list[Client] = []
        self.segments: set[Path] = set()  # every segment that was seen in use

    def __enter__(self) -> Arena:
        self.links.__enter__()
        try:
            if self._keys:
                generate(self._keys)
            port = common_port(ALL_NODES)
            for number in range(1, ALL_NODES + 1):
                self.nodes.append(Node(number, self._data, self.links, port, self._folder, self._keys))
            for node in self.nodes[:FIRST_NODES]:
                self.add(node)
            by_address = ",".join(node.address for node in self.nodes)
            for transport, known in (("auto", by_address), ("tcp", f"tcp://{NAME}:{port}")):
                seed = self._rng.getrandbits(32)
                self.clients.append(Client(transport, known, seed, self._folder, self._name_file, self._keys))
                self.clients[-1].start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for client in self.clients:
            client.kill()
        for node in self.nodes:
            node.stop()
        self.links.__exit__(None, None, None)

    def add(self, node: Node) -> None:
        """Start a node where there was none, and let the name stand for it too."""
        node.start()
        self.names.add(node.link.host)

    @property
    def _owners(self) -> list[Node | Client]:
        return [*self.nodes, *self.clients]

    def note_segments(self) -> None:
        """Remember who has which shared memory, to look for it when they are gone."""
        for owner in self._owners:
            self.segments |= owner.segments()

    def check(self) -> None:
        """See that every client lives."""
        for client in self.clients:
            client.check()

    def finish(self, patience_s: float) -> None:
        """Let the clients end their epochs, and the nodes in peace.

        Raises:
            ToolFailed: one of them does not.
        """
        for client in self.clients:
            client.finish(patience_s)
        for node in self.nodes:
            if node.stop() not in (0, None):
                raise ToolFailed(f"{node.name} did not end in peace.")

    def left_behind(self) -> list[str]:
        """What is still there of a run that is over: processes and shared memory, as sentences."""
        sessions = [session for owner in self._owners for session in owner.sessions]
        left = [
            f"process {process.pid} ({process.state})"
            for session in sessions
            for process in processes.in_session(session)
        ]
        return [*left, *(f"shared memory {path}" for path in sorted(self.segments) if path.exists())]
