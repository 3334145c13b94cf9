"""A node at one address for a whole run, behind a link, that can be killed and started again."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from pathlib import Path

from loader_service import LocalNode
from tools.chaos import processes
from tools.chaos.link import HOST, Link, Links

WORKERS = 2


def link_host(number: int) -> str:
    """Where the link to a node listens: an address of its own, since all that a name stands for have one port."""
    return f"127.0.0.{number + 1}"


def common_port(nodes: int) -> int:
    """A port that is free at the links of nodes 1 to ``nodes``."""
    with ExitStack() as probes:
        first = probes.enter_context(socket.socket())
        first.bind((link_host(1), 0))
        port: int = first.getsockname()[1]
        for number in range(2, nodes + 1):
            probes.enter_context(socket.socket()).bind((link_host(number), port))
    return port


class Node:
    """One address. The node behind it comes and goes.

    Args:
        number: from 1; for people, for the log's name and for the link's host.
        data: what it serves.
        links: where its link is made; clients know the link's address alone.
        port: of the link.
        folder: where its log goes.
        keys: the directory of the node's keys, if it has any.

    Fields:
        lost: whether it is gone for good.
        troubled: whether a fault is at work on its processes.
        link_troubled: whether one is at work on its link.
    """

    def __init__(self, number: int, data: Path, links: Links, port: int, folder: Path, keys: Path | None) -> None:
        self.name = f"node {number}"
        self._data, self._log, self._keys = data, folder / f"node-{number}.log", keys
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self._port: int = probe.getsockname()[1]
        self.link: Link = links.new(self._port, link_host(number), port)
        self.address = f"tcp://{self.link.host}:{self.link.port}"
        self.lost = self.troubled = self.link_troubled = False
        self.sessions: list[int] = []  # one for each start
        self._node: LocalNode | None = None

    @property
    def runs(self) -> bool:
        """Whether its dispatcher is there, be it stopped."""
        return self._node is not None and self._node.exit_code is None

    @property
    def dispatcher(self) -> int:
        """The dispatcher's process id."""
        assert self._node is not None
        return self._node.pid

    def start(self) -> None:
        """Start it, at the address that it always has, and wait until it serves."""
        bind = f"tcp://{HOST}:{self._port}"
        self._node = LocalNode(self._data, WORKERS, bind=bind, keys=self._keys, log=self._log)
        self.sessions.append(self._node.pid)

    def workers(self) -> list[int]:
        """The workers' process ids: of the dispatcher's session, whoever is the fork server's child."""
        family = processes.in_session(self.dispatcher)
        fork_server = {process.pid for process in family if process.parent == self.dispatcher}
        return sorted(process.pid for process in family if process.parent in fork_server)

    def family(self) -> list[int]:
        """All its process ids, the dispatcher's last."""
        pids = [process.pid for process in processes.in_session(self.dispatcher) if process.pid != self.dispatcher]
        return [*pids, self.dispatcher]

    def segments(self) -> set[Path]:
        """The segments that the dispatcher has open."""
        return processes.segments_of(self.dispatcher) if self.runs else set()

    def kill(self) -> None:
        """SIGKILL its dispatcher, as a machine's end would."""
        assert self._node is not None
        self._node.kill()

    def stop(self) -> int | None:
        """End it in peace; its exit code, or None if it had ended before."""
        if self._node is None or not self.runs:
            return None
        processes.send(self.family(), signal.SIGCONT)  # a stopped process would not see SIGTERM
        self._node.close()
        return self._node.exit_code
