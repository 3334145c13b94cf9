"""The system under fault injection: nodes behind links, and the clients that train from all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final

from loader_service.wire.auth import generate
from tools.chaos import processes
from tools.chaos.journal import read_saved
from tools.chaos.link import Links
from tools.chaos.name_server import NAME, NameServer
from tools.chaos.node import ChaosNode, common_port
from tools.errors import ToolFailed

FIRST_NODES: Final = 4
"""Enough for the three longest faults of a node at once, with one node left that serves."""

ALL_NODES: Final = 8
"""Addresses that the clients know from the start; at those beyond the first, nodes are added during the run."""


class ChaosClient:
    """A client's process, its journal and its saved state.

    Args:
        transport: ``auto`` or ``tcp``; also part of its name.
        addresses: addresses of the nodes, with commas between, or the name that stands for them.
        seed: seed of its epochs.
        folder: folder of all clients' folders.
        names: file that replaces the name server.
        keys: folder of the keys, None for no encryption.

    Fields:
        sessions: session ids of all its starts.
        killed: whether a fault has killed it and not restarted it yet.
    """

    def __init__(self, transport: str, addresses: str, seed: int, folder: Path, names: Path, keys: Path | None) -> None:
        self.name, self.seed, self.folder = f"client-{transport}", seed, folder / f"client-{transport}"
        self._command = [sys.executable, "-m", "tools.chaos.client", addresses, transport, str(seed)]
        self._command += [str(self.folder), "--names", str(names), *(["--keys", str(keys)] if keys else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []
        self.killed = False

    def start(self) -> None:
        """Start it; after an earlier start it resumes from its saved state."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("a") as log:  # appends: one log over all restarts
            # A new session, whose id is the pid: left_behind() finds what it leaves, and Ctrl-C does not reach it.
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        self.sessions.append(self._process.pid)
        self.killed = False  # check() applies again

    def batches(self) -> int:
        """Return the number of batches in its saved state."""
        saved = read_saved(self.folder)
        return saved.lines if saved else 0

    def kill(self) -> bool:
        """End it with SIGKILL; return whether it ran."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        self._process.wait()  # two processes of one client would write the same journal
        self.killed = True
        return True

    def check(self) -> None:
        """Check that it runs, unless a fault has killed it.

        Raises:
            ToolFailed: it ended by itself.
        """
        # The process before the restart ended by SIGKILL.
        if not self.killed and self._process and self._process.poll() is not None:
            said = (self.folder / "log").read_text().strip().splitlines()
            raise ToolFailed(f"{self.name} ended by itself: {said[-1] if said else self._process.returncode}.")

    def finish(self, patience_s: float) -> None:
        """Let it finish its epoch and end.

        Raises:
            ToolFailed: it hangs, or ended with an error.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)  # the client then ends at the end of its epoch
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise ToolFailed(
                f"{self.name} did not finish its epoch within {patience_s:.0f} s after the last fault."
            ) from None
        self.killed = self._process.returncode == 0  # exit code 0 is its regular end, which check() must not report
        self.check()

    def segments(self) -> set[Path]:
        """Return the segments that it has open."""
        return processes.segments_of(self._process.pid) if self._process else set()


class Arena:
    """Nodes and clients of one run; a context manager that ends every process, however the block ends.

    One client knows all addresses, also those without a node so far, and shares memory with the nodes; the other knows
    their name and receives frames over TCP.

    Args:
        data: directory of the dataset.
        folder: folder of logs, journals and states.
        rng: source of the clients' seeds.
        curve: whether nodes and clients have keys.

    Fields:
        segments: every segment that was seen in use, including those of processes that have ended.
    """

    def __init__(self, data: Path, folder: Path, rng: Random, *, curve: bool) -> None:
        self.links = Links()
        self._data, self._folder, self._rng = data, folder, rng
        self._keys = folder / "keys" if curve else None
        self._name_file = folder / "names"
        self.names = NameServer(self._name_file)
        self.nodes: list[ChaosNode] = []
        self.clients: list[ChaosClient] = []
        self.segments: set[Path] = set()

    def __enter__(self) -> Arena:
        self.links.__enter__()  # first: each node has a link
        try:
            if self._keys:  # before nodes and clients, which read them as they start
                generate(self._keys)
            port = common_port(ALL_NODES)
            for number in range(1, ALL_NODES + 1):
                # All addresses exist from the start; those beyond FIRST_NODES refuse connections until a node is added.
                self.nodes.append(ChaosNode(number, self._data, self.links, port, self._folder, self._keys))
            for node in self.nodes[:FIRST_NODES]:
                self.add(node)
            by_address = ",".join(node.address for node in self.nodes)
            for transport, known in (("auto", by_address), ("tcp", f"tcp://{NAME}:{port}")):
                seed = self._rng.getrandbits(32)  # of the order and the augmentation; clients differ
                self.clients.append(ChaosClient(transport, known, seed, self._folder, self._name_file, self._keys))
                self.clients[-1].start()  # after the first nodes, which serve by now
        # Python does not call __exit__ if __enter__ raises.
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

    def add(self, node: ChaosNode) -> None:
        """Start a node at an address without one, and add that address to the name."""
        node.start()
        self.names.add(node.link.host)

    @property
    def _owners(self) -> list[ChaosNode | ChaosClient]:
        return [*self.nodes, *self.clients]

    def note_segments(self) -> None:
        """Remember the shared memory that is open now, to look for it after its owners have ended."""
        for owner in self._owners:
            self.segments |= owner.segments()  # a set that only grows: names are random, so never used twice

    def check(self) -> None:
        """Check that every client runs.

        Raises:
            ToolFailed: one ended by itself.
        """
        for client in self.clients:
            client.check()

    def finish(self, patience_s: float) -> None:
        """Let the clients finish their epochs, then stop the nodes.

        Raises:
            ToolFailed: a client hangs, or a process ended with an error.
        """
        for client in self.clients:
            client.finish(patience_s)
        for node in self.nodes:
            if node.stop() not in (0, None):  # None: never started, or lost to a fault
                raise ToolFailed(f"{node.name} did not end cleanly.")

    def left_behind(self) -> list[str]:
        """Return the processes and the shared memory that a finished run has left, in words."""
        sessions = [session for owner in self._owners for session in owner.sessions]
        left = [
            f"process {process.pid} ({process.state})"
            for session in sessions
            for process in processes.in_session(session)
        ]
        return [*left, *(f"shared memory {path}" for path in sorted(self.segments) if path.exists())]
