"""A node under fault injection: one address for a whole run, behind a link, where the node is killed and restarted."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from loader_service import LocalNode
from tools.chaos import processes
from tools.chaos.link import HOST, Link, Links

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


class ChaosNode:
    """One address, with a node behind it that starts and ends several times.

    Args:
        number: from 1; part of its name, of its log's and of the link's address.
        data: directory of the dataset.
        links: owner of its link; clients know the link's address alone.
        port: port of the link.
        folder: folder of its log.
        keys: directory of the node's keys, None for a node without.

    Fields:
        troubled: whether a fault holds its processes.
        link_troubled: whether a fault holds its link.
        sessions: session ids of all its starts.
    """

    def __init__(self, number: int, data: Path, links: Links, port: int, folder: Path, keys: Path | None) -> None:
        self.name = f"node {number}"
        self._data, self._log, self._keys = data, folder / f"node-{number}.log", keys
        # A port for the whole run: clients must find a restarted node at its old address. It is free between two
        # starts.
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self._port: int = probe.getsockname()[1]
        self.link: Link = links.new(self._port, link_host(number), port)
        self.address = f"tcp://{self.link.host}:{self.link.port}"
        self.troubled = self.link_troubled = False
        self.sessions: list[int] = []
        self._node: LocalNode | None = None

    @property
    def runs(self) -> bool:
        """True if its dispatcher exists, suspended or not."""
        return self._node is not None and self._node.exit_code is None

    @property
    def dispatcher(self) -> int:
        """Process id of the dispatcher."""
        assert self._node is not None
        return self._node.pid

    def start(self) -> None:
        """Start the node at its address, which never changes, and wait until it serves."""
        bind = f"tcp://{HOST}:{self._port}"
        options = () if self._keys else ("--insecure",)
        self._node = LocalNode(self._data, WORKERS, bind=bind, keys=self._keys, options=options, log=self._log)
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
