"""A node under fault injection: one address for a whole run, behind a link, where the node is killed and restarted."""

from __future__ import annotations

import math
import signal
import socket
import sys
import time
from contextlib import ExitStack
from enum import Enum, auto
from pathlib import Path
from typing import Final

from loader_service import LocalNode
from tools.chaos import processes
from tools.chaos.link import HOST, Link, Links

PROGRAM: Final = (sys.executable, "-m", "tools.chaos.haste")
WORKERS: Final = 2


def link_host(number: int) -> str:
    """Return the address of the link to a node. Each has its own: all addresses behind a name share one port."""
    return f"127.0.0.{number + 1}"  # Linux answers on all of 127.0.0.0/8; 127.0.0.1 is the nodes'


def common_port(nodes: int) -> int:
    """Return a port that is free at the links of nodes 1 to ``nodes``."""
    with ExitStack() as probes:
        first = probes.enter_context(socket.socket())
        first.bind((link_host(1), 0))
        port: int = first.getsockname()[1]
        for number in range(2, nodes + 1):
            # All probes stay bound until the port has proved free at every address. Another program may still take it
            # before the links listen.
            probes.enter_context(socket.socket()).bind((link_host(number), port))
    return port


class Part(Enum):
    """A part of a node that one fault at a time may hold."""

    PROCESSES = auto()
    LINK = auto()


class ChaosNode:
    """One address, with a node behind it that starts and ends several times.

    Args:
        number: from 1; part of its name, of its log's and of the link's address.
        data: directory of the dataset.
        links: owner of its link; clients know the link's address alone.
        port: port of the link.
        folder: folder of its log and of its own copy of the dataset.
        keys: directory of the node's keys, None for a node without.

    Fields:
        unsound: whether its data are damaged.
        calm_since: monotonic time since which no fault holds any part of it.
        sessions: session ids of all its starts.
        keys: see above.
        copy: folder for its own copy of the dataset.
    """

    def __init__(self, number: int, data: Path, links: Links, port: int, folder: Path, keys: Path | None) -> None:
        self.name = f"node {number}"
        self._data, self._log, self.keys = data, folder / f"node-{number}.log", keys
        self.copy = folder / f"node-{number}"
        # A port for the whole run: clients must find a restarted node at its old address. It is free between two
        # starts.
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.link: Link = links.new(self.port, link_host(number), port)
        self.address = f"tcp://{self.link.host}:{self.link.port}"
        self.direct = f"tcp://{HOST}:{self.port}"
        self.unsound = False
        self.calm_since = math.inf
        self.sessions: list[int] = []
        self._held: set[Part] = set()
        self._node: LocalNode | None = None

    def hold(self, part: Part) -> None:
        """Mark a part as held by a fault."""
        self._held.add(part)
        self.calm_since = math.inf

    def let_go(self, part: Part) -> None:
        """Mark a part as free."""
        self._held.discard(part)
        self.calm_since = math.inf if self._held else time.monotonic()

    def is_held(self, part: Part) -> bool:
        """Return whether a fault holds a part."""
        return part in self._held

    @property
    def runs(self) -> bool:
        """True if its dispatcher exists, suspended or not."""
        return self._node is not None and self._node.exit_code is None

    @property
    def dispatcher(self) -> int:
        """Process id of the dispatcher."""
        assert self._node is not None
        return self._node.pid

    def start(self, data: Path | None = None, descriptors: int | None = None) -> None:
        """Start the node at its address, which never changes, and wait until it serves.

        Args:
            data: directory of the dataset, in place of the usual one.
            descriptors: limit of its open files and sockets.
        """
        program: tuple[str, ...] = PROGRAM
        if descriptors:  # the hard limit, too, so that the node cannot raise it
            program = ("sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', *PROGRAM)
        self._node = LocalNode(
            data or self._data,
            WORKERS,
            bind=self.direct,
            keys=self.keys,
            options=() if self.keys else ("--insecure",),
            log=self._log,
            program=program,
        )
        self.sessions.append(self._node.pid)  # LocalNode starts its node as the leader of a session

    def workers(self) -> list[int]:
        """Return the workers' process ids: the fork server's children."""
        family = processes.in_session(self.dispatcher)
        # The dispatcher's child; its own children are the workers.
        fork_server = {process.pid for process in family if process.parent == self.dispatcher}
        return sorted(process.pid for process in family if process.parent in fork_server)

    def family(self) -> list[int]:
        """Return all process ids of the node, the dispatcher's last."""
        pids = [process.pid for process in processes.in_session(self.dispatcher) if process.pid != self.dispatcher]
        return [*pids, self.dispatcher]

    def segments(self) -> set[Path]:
        """Return the segments that the dispatcher has open."""
        return processes.segments_of(self.dispatcher) if self.runs else set()

    def kill(self) -> None:
        """End the dispatcher with SIGKILL, as a crash of its machine would."""
        assert self._node is not None
        self._node.kill()  # PDEATHSIG ends the rest of the node

    def stop(self) -> int | None:
        """End the node with SIGTERM; return its exit code, or None if it did not run."""
        if self._node is None or not self.runs:
            return None
        processes.send(self.family(), signal.SIGCONT)  # a suspended process would not react to SIGTERM
        self._node.close()
        return self._node.exit_code
