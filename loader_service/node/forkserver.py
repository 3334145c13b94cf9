"""The fork server: a small process that forks a node's workers and reaps them.

A fork of a process that has imported everything starts a worker in milliseconds and shares the memory of the libraries.
The dispatcher cannot fork: libzmq's threads do not exist in a forked child, but their locks do. So the dispatcher forks
the fork server before it creates any thread or socket. The fork server reports the death of each worker to the
dispatcher. When the dispatcher ends, in whatever way, the fork server kills the workers and ends.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from loader_service.errors import LoaderServiceError
from loader_service.node.packets import MAX_PACKET_BYTES, Died, Fork, Forked, decode_fork, decode_fork_server, encode
from loader_service.node.worker import die_with_parent

log = logging.getLogger("loader_service.node")

WorkerMain = Callable[[int, socket.socket], None]
"""The main function of a worker; its arguments are its index and its end of the socket pair with the dispatcher."""

_MAX_DESCRIPTORS: Final = 1  # a Fork packet carries one descriptor: the worker's end of its socket pair


class ForkServer:
    """The dispatcher's handle of its fork server.

    The constructor forks, so the process must have one thread at that time.

    Args:
        worker_main: main function of each worker.
    """

    def __init__(self, worker_main: WorkerMain) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        dispatcher = os.getpid()
        sys.stdout.flush()  # else the child would write the buffered text a second time
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.link.close()  # an open copy here would hide the dispatcher's end from the fork server
            _run_and_exit(lambda: _serve(theirs, worker_main, dispatcher))
        theirs.close()  # so that recv() on our end returns when the fork server has ended

    def spawn_worker(self, index: int) -> socket.socket:
        """Ask for worker ``index``, and return the dispatcher's end of its socket pair."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The packet holds a duplicate of the descriptor.
        socket.send_fds(self.link, [encode(Fork(index))], [theirs.fileno()])
        theirs.close()  # only the worker may hold its end: the end of the worker must be an end of file here
        ours.setblocking(False)  # the pool reads it until it would block
        return ours

    def receive(self) -> Forked | Died | None:
        """Return the next packet, when :attr:`link` is readable; None if the fork server has ended."""
        packet = self.link.recv(MAX_PACKET_BYTES)
        return decode_fork_server(packet) if packet else None  # an empty packet is the end of file

    def close(self) -> None:
        """Kill all workers, end the fork server, and wait until they are gone."""
        self.link.close()
        os.waitpid(self.pid, 0)  # it reaps all workers before it ends


def _serve(link: socket.socket, worker_main: WorkerMain, dispatcher: int) -> None:
    """Run the fork server: fork on demand, report deaths, and end with the dispatcher."""
    # Ctrl-C and `kill -- -PGID` reach the whole process group; only the dispatcher acts on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(dispatcher)
    children: dict[int, tuple[int, int]] = {}  # by pidfd: index, pid
    try:
        _fork_on_demand(link, worker_main, children)
    except ConnectionError:  # the dispatcher ended while a packet was sent to it
        _kill_all(children)


def _fork_on_demand(link: socket.socket, worker_main: WorkerMain, children: dict[int, tuple[int, int]]) -> None:
    poller = select.poll()  # the link, and a pidfd per worker: no SIGCHLD handler and no polling with waitpid
    poller.register(link, select.POLLIN)
    while True:
        for descriptor, _ in poller.poll():
            if descriptor in children:  # a pidfd is readable when its process has ended
                poller.unregister(descriptor)
                link.send(encode(_reap(descriptor, *children.pop(descriptor))))
                continue
            packet, descriptors, _, _ = socket.recv_fds(link, MAX_PACKET_BYTES, _MAX_DESCRIPTORS)
            if not packet:  # the dispatcher closed its end, or died
                _kill_all(children)
                return
            index = decode_fork(packet).index
            pid = _spawn_worker(index, socket.socket(fileno=descriptors[0]), worker_main, [link.fileno(), *children])
            pidfd = os.pidfd_open(pid)  # no race: an unreaped child's pid is not reused
            children[pidfd] = (index, pid)
            poller.register(pidfd, select.POLLIN)
            link.send(encode(Forked(index, pid)))


def _spawn_worker(index: int, link: socket.socket, worker_main: WorkerMain, foreign: list[int]) -> int:
    fork_server = os.getpid()  # before the fork: the child compares it with its parent
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # SIGINT stays ignored: Ctrl-C is for the dispatcher
        for descriptor in foreign:  # an inherited copy of the link would hide the end of the fork server
            os.close(descriptor)

        def run() -> None:
            die_with_parent(fork_server)
            worker_main(index, link)

        _run_and_exit(run)
    link.close()  # the worker has the only copy now, so its end is an end of file for the dispatcher
    return pid


def _reap(pidfd: int, index: int, pid: int) -> Died:
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)  # ended, or killed a moment ago
    return Died(index, pid, os.waitstatus_to_exitcode(status))


def _kill_all(children: dict[int, tuple[int, int]]) -> None:
    for pidfd in children:  # kill all before waiting for any; unlike a pid, a pidfd never means another process
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd, (index, pid) in children.items():
        _reap(pidfd, index, pid)


def _run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Run the main function of a forked process and end it by os._exit, which skips the exit handlers of the parent."""
    code = 1
    try:
        main()
        code = 0
    except LoaderServiceError as error:
        log.error("process %d cannot continue: %s", os.getpid(), error)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()  # os._exit flushes no buffers
        os._exit(code)
