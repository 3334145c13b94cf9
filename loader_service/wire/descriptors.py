"""The descriptors of a node: its limit, and the connections that may use them.

Each connection takes a descriptor. Once a process has no descriptor left, libzmq cannot accept the next connection, and its I/O
thread tries again without a pause, since the connection still waits; besides, the node could replace no worker. So a
:class:`ConnectionGate` closes connections beyond a limit as soon as libzmq has accepted them, and keeps the rest in reserve.
"""

from __future__ import annotations

import resource
import socket
from typing import Any, Final
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

MAX_DESCRIPTORS: Final = 3_072
"""Descriptors that a node uses at most: enough for MAX_CLIENTS clients with twelve connections each. A connection before its
handshake takes about 18 KB, so as many of them stay below the 64 MiB that peers without a key may cost."""

RESERVED: Final = 8
RESERVED_PER_WORKER: Final = 2
"""Descriptors that connections may not use: for segments, files and name look-ups, and for the links of replaced workers."""

EVENTS_PER_TURN: Final = 64
"""Events read before the caller's loop goes on, so that a flood of connections cannot starve it."""


def raise_limit() -> int:
    """Raise this process's soft limit of open files to the hard limit, MAX_DESCRIPTORS at most; return how many it may use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))  # never fails up to the hard limit
        soft = wanted
    return min(soft, MAX_DESCRIPTORS)


class ConnectionGate:
    """The limit of the connections to a node's socket. Poll :attr:`socket`, and call :meth:`close_excess` when it is readable.

    Args:
        router: the node's socket, bound already.
        address: its address.
        workers: the node's workers.
    """

    def __init__(self, router: zmq.Socket[bytes], address: str, workers: int) -> None:
        self._router = router
        # A connection's own name is that of the socket that accepted it.
        self._ours = urlsplit(address).port if address.startswith("tcp://") else address.removeprefix("ipc://")
        self.limit = raise_limit()
        # The kernel gives out the lowest free number. So a connection whose number reaches this bound shows that all
        # descriptors below it are in use; nobody needs to count them.
        self._bound = self.limit - RESERVED - RESERVED_PER_WORKER * workers
        self.socket: zmq.Socket[bytes] = router.get_monitor_socket(zmq.Event.ACCEPTED)

    def close_excess(self) -> int:
        """Close the connections beyond the limit that were accepted since the last call; return their number."""
        closed = 0
        for _ in range(EVENTS_PER_TURN):
            if not self.socket.poll(0):
                break
            descriptor = int(recv_monitor_message(self.socket)["value"])
            closed += self.in_reserve(descriptor) and self._shut_down(descriptor)
        return closed

    def in_reserve(self, descriptor: int) -> bool:
        """Return whether a descriptor that was just opened for a client is one of the reserved ones."""
        return descriptor >= self._bound

    def close(self) -> None:
        """Stop watching. Call it before the node's socket is closed."""
        self._router.disable_monitor()
        self.socket.close(linger=0)

    def _shut_down(self, descriptor: int) -> bool:
        """Shut a connection down, upon which libzmq closes it; return False if the number no longer belongs to one."""
        # libzmq may have closed it meanwhile, and the number may belong to a worker's link or another connection. Another
        # connection reconnects; so it is enough that it is one.
        try:
            connection: Any = socket.socket(fileno=descriptor)  # looks the descriptor up, opens nothing
        except OSError:
            return False
        try:
            name = connection.getsockname()
            mine = bool((name if connection.family == socket.AF_UNIX else name[1]) == self._ours)
            if mine:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer has closed it already
            mine = False
        finally:
            connection.detach()  # the descriptor is libzmq's, and is not closed here
        return mine
