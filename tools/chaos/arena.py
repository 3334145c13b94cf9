"""The system under fault injection: nodes behind links, and the clients that train from all of them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final

from loader_service.client import query
from loader_service.client.protocol import Transport
from loader_service.errors import LoaderServiceError
from loader_service.wire.auth import generate
from loader_service.wire.messages import Status
from tools.chaos import damage, processes
from tools.chaos.journal import read_saved
from tools.chaos.link import Links
from tools.chaos.name_server import NAME, NameServer
from tools.chaos.node import ChaosNode, Part, common_port
from tools.errors import ToolFailed

FIRST_NODES: Final = 5
"""Enough for the longest faults of a node at once, with nodes left that serve."""

ALL_NODES: Final = 8
"""Addresses that the clients know from the start; at those beyond the first, nodes are added during the run."""

STEADY_S: Final = 6.0
"""Time without a fault after which every client has found a node again: it greets one that was lost within two seconds."""

STEADY_NODES: Final = 2
"""Steady nodes that a node with damaged data needs beside it. A client replaces a record that no node of those it has can
read, so a sound one must be among them."""

STARTERS: Final = 3
"""Nodes that start at a time; each takes a core for a second."""

DAMAGED: Final = 2
"""Records that are damaged on every node, so that clients must replace them."""

STATUS_S: Final = 2.0
"""Timeout for a node to tell its status; a node that no fault holds takes milliseconds."""


@dataclass(frozen=True)
class Kind:
    """One kind of client.

    Fields:
        name: its name.
        transport: ``auto`` or ``tcp``.
        connections: TCP connections to each node that sends frames.
        by_name: whether it finds the nodes by their common name, or knows all their addresses.
    """

    name: str
    transport: Transport
    connections: int
    by_name: bool


KINDS: Final = (
    Kind("client-auto", "auto", 2, by_name=False),  # shares memory with the nodes
    Kind("client-name", "tcp", 2, by_name=True),
    Kind("client-lanes", "tcp", 4, by_name=False),
)


class ChaosClient:
    """A client's process, its journal and its saved state.

    Args:
        kind: its kind.
        addresses: addresses of the nodes, with commas between, or the name that stands for them.
        seed: seed of its epochs.
        folder: folder of all clients' folders.
        names: file that replaces the name server.
        keys: folder of its keys, None for no encryption.

    Fields:
        sessions: session ids of all its starts.
        killed: whether a fault has killed it and not restarted it yet.
        interrupted: whether a fault interrupts it.
    """

    def __init__(self, kind: Kind, addresses: str, seed: int, folder: Path, names: Path, keys: Path | None) -> None:
        self.name, self.seed, self.folder = kind.name, seed, folder / kind.name
        self._command = [sys.executable, "-m", "tools.chaos.client", addresses, kind.transport, str(seed)]
        self._command += [str(self.folder), "--names", str(names), "--connections", str(kind.connections), "--hurry"]
        self._command += ["--keys", str(keys)] if keys else []
        self._process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []
        self.killed = self.interrupted = False

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

    def interrupts(self) -> int | None:
        """Return the interrupts that the running process has caught, None before its first batch."""
        saved = read_saved(self.folder)
        return saved.interrupts if saved and self._process and saved.pid == self._process.pid else None

    def interrupt(self) -> None:
        """Send it SIGINT, if it runs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

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

    KINDS are its clients. All but one know all addresses, also those without a node so far; the other knows their name.
    With keys, every client has its own pair, and every node its own list of allowed clients.

    Args:
        data: directory of the dataset, whose copy every node serves.
        folder: folder of logs, journals, states and copies.
        rng: source of the clients' seeds and of the damage.
        curve: whether nodes and clients have keys.

    Fields:
        served: the copy of the dataset that the nodes serve; DAMAGED records of it are damaged.
        damaged: the numbers of these records.
        segments: every segment that was seen in use, including those of processes that have ended.
    """

    def __init__(self, data: Path, folder: Path, rng: Random, *, curve: bool) -> None:
        self.links = Links()
        self.folder, self._rng, self.curve = folder, rng, curve
        self.served = folder / "served"
        self._name_file = folder / "names"
        self.names = NameServer(self._name_file)
        self.nodes: list[ChaosNode] = []
        self.clients: list[ChaosClient] = []
        self.segments: set[Path] = set()
        self._starters = ThreadPoolExecutor(STARTERS, "starter")
        self._jobs: list[Future[None]] = []
        damage.copy(data, self.served)
        self.damaged = sorted(rng.sample(range(damage.count(data)), DAMAGED))
        damage.flip_bits(self.served, self.damaged, rng)

    def __enter__(self) -> Arena:
        self.links.__enter__()  # first: each node has a link
        try:
            if self.curve:  # before nodes and clients, which read them as they start
                self._make_keys()
            port = common_port(ALL_NODES)
            for number in range(1, ALL_NODES + 1):
                # All addresses exist from the start; those beyond FIRST_NODES refuse connections until a node is added.
                keys = self._keys_of(f"node-{number}")
                self.nodes.append(ChaosNode(number, self.served, self.links, port, self.folder, keys))
            for started in [self.add(node) for node in self.nodes[:FIRST_NODES]]:
                started.result()
            by_address = ",".join(node.address for node in self.nodes)
            for kind in KINDS:
                known = f"tcp://{NAME}:{port}" if kind.by_name else by_address
                seed = self._rng.getrandbits(32)  # of the order and the augmentation; clients differ
                keys = self._keys_of(kind.name)
                self.clients.append(ChaosClient(kind, known, seed, self.folder, self._name_file, keys))
                self.clients[-1].start()  # after the first nodes, which serve by now
        # Python does not call __exit__ if __enter__ raises.
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._starters.shutdown(
            cancel_futures=True
        )  # waits for a node that is starting, which would outlive the others
        for client in self.clients:
            client.kill()
        for node in self.nodes:
            node.stop()
        self.links.__exit__(None, None, None)

    # Keys

    def _make_keys(self) -> None:
        """Make the keys: one pair for all nodes, one for each client and for this process, lists of the clients."""
        first = self._keys_of("watcher")
        assert first is not None
        generate(first)
        for kind in KINDS:
            own = self._keys_of(kind.name)
            assert own is not None
            generate(own)
            shutil.copy(first / "node.key", own / "node.key")
            shutil.copy(own / "allowed" / "client.key", first / "allowed" / f"{kind.name}.key")
        for number in range(1, ALL_NODES + 1):
            shutil.copytree(first, self.folder / "keys" / f"node-{number}")

    def _keys_of(self, owner: str) -> Path | None:
        return self.folder / "keys" / owner if self.curve else None

    @property
    def watcher(self) -> Path | None:
        """Folder of this process's keys, by which it asks nodes for their status; None without keys."""
        return self._keys_of("watcher")

    # Nodes

    def begin(self, job: Callable[[], None]) -> Future[None]:
        """Run a job that takes a second or more, such as the start of a node, beside the storm."""
        self._jobs.append(self._starters.submit(job))
        return self._jobs[-1]

    @property
    def busy(self) -> bool:
        """True while a job runs or waits."""
        return not all(job.done() for job in self._jobs)

    def add(self, node: ChaosNode) -> Future[None]:
        """Start a node at an address without one, and add that address to the name."""
        node.hold(Part.PROCESSES)

        def start() -> None:
            node.start()
            node.let_go(Part.PROCESSES)
            self.names.add(node.link.host)

        return self.begin(start)

    def steady(self, node: ChaosNode) -> bool:
        """Return whether every client has this node and gets sound data from it."""
        calm = node.runs and time.monotonic() - node.calm_since > STEADY_S
        return calm and not node.unsound and node.link.host not in self.names.hidden

    def can_spare(self, node: ChaosNode, *, damaging: bool = False) -> bool:
        """Return whether a fault may take a node away: nodes with damaged data need steady ones beside them."""
        if not damaging and not any(other.unsound for other in self.nodes):
            return True
        return sum(self.steady(other) for other in self.nodes if other is not node) >= STEADY_NODES

    def status(self, node: ChaosNode) -> Status | None:
        """Return a node's status, past its link; None if it does not tell."""
        keys = self.watcher
        server_key, client_key = (keys / "node.key", keys / "client.secret") if keys else (None, None)
        try:
            return query.status(
                node.direct, STATUS_S, server_key=server_key, client_key=client_key, insecure=keys is None
            )
        except LoaderServiceError:
            return None

    # The whole

    @property
    def _owners(self) -> list[ChaosNode | ChaosClient]:
        return [*self.nodes, *self.clients]

    def note_segments(self) -> None:
        """Remember the shared memory that is open now, to look for it after its owners have ended."""
        for owner in self._owners:
            self.segments |= owner.segments()  # a set that only grows: names are random, so never used twice

    def check(self) -> None:
        """Check that every client runs and that no job has failed.

        Raises:
            ToolFailed: a client ended by itself.
            LoaderServiceError: a job's error, for instance of a node that does not start.
        """
        for client in self.clients:
            client.check()
        ended = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        for job in ended:
            job.result()

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
