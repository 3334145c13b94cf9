"""The worker pool: it spawns, kills, reaps and replaces the worker processes of a node.

It knows processes and socket pairs; the scheduler knows which worker has which lease. A worker is replaced here: the fork
server reports a death, :meth:`WorkerPool._reap` logs it and schedules a new process, and the dispatcher passes the
:class:`Death` to the scheduler, which leases its slices to other workers.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zmq

from loader_service.errors import NodeFailed
from loader_service.node.forkserver import ForkServer
from loader_service.node.packets import (
    MAX_PACKET_BYTES,
    Bad,
    Died,
    Done,
    Forked,
    Lease,
    Ready,
    Release,
    decode_answer,
    encode,
)
from loader_service.node.worker import NO_RECORD
from loader_service.types import STAGES

log = logging.getLogger("loader_service.node")

MAX_FAILED_STARTS: Final = 5
"""Workers in a row that die before they are ready, after which the node fails: the next one would die, too."""

RESPAWN_PAUSE_S: Final = 0.1
"""Pause in seconds before a worker that died before it was ready is replaced; it doubles with each such death in a row."""


@dataclass(frozen=True)
class Death:
    """The event of a worker process that has ended and is reaped.

    Fields:
        crashed: True if it ended by itself (a fault, an exception), False if it was killed from outside.
        record: the record that it read, as it had published; NO_RECORD if none.
        how: exit code or signal, for people.
    """

    crashed: bool
    record: int
    how: str


Event = Forked | Ready | Done | Bad | Death


class WorkerPool:
    """The processes of one node's workers.

    Args:
        fork_server: forks the workers.
        progress: (workers, 2) int64 shared with the workers: the record and the index of the stage of each, -1 for none.
        poller: the dispatcher's poller; the pool registers and unregisters its descriptors there.
        stall_s: seconds at one record after which a worker is killed.
    """

    def __init__(
        self, fork_server: ForkServer, progress: npt.NDArray[np.int64], poller: zmq.Poller, stall_s: float
    ) -> None:
        self._fork_server, self._poller, self._stall_s = fork_server, poller, stall_s
        self._shared_progress = progress
        self._links: dict[int, socket.socket] = {}  # by worker index
        self._by_descriptor: dict[int, int] = {}  # worker index by descriptor of its link
        self._pids: dict[int, int] = {}  # by worker index
        self._ready: set[int] = set()  # workers that said Ready
        # By worker index: the lease and record that it was last seen at, and the time when it reached them.
        self._last_moves: dict[int, tuple[int, int, float]] = {}
        self._failed_starts = 0  # in a row
        self._due_spawns: list[tuple[float, int]] = []  # time and worker index
        poller.register(fork_server.link.fileno(), zmq.POLLIN)
        for index in range(len(progress)):
            self._spawn(index)  # returns at once; Forked and Ready follow over the links

    def receive(self, descriptor: int) -> Iterator[tuple[int, Event]]:
        """Yield worker index and event for everything that a readable descriptor brings; nothing for a foreign descriptor.

        Raises:
            NodeFailed: the fork server has ended, or MAX_FAILED_STARTS workers in a row died before they were ready.
        """
        if descriptor == self._fork_server.link.fileno():
            yield from self._receive_from_fork_server()
        elif descriptor in self._by_descriptor:
            yield from self._receive_from_worker(self._by_descriptor[descriptor])

    def give(self, index: int, lease: Lease) -> None:
        """Send a lease to a worker. If the worker is dead, its Death follows, and the scheduler leases the slice again."""
        self._send(index, lease)

    def release(self, segment: str) -> None:
        """Have all workers unmap a client's segment; a worker that writes a slice does so after it."""
        for index in list(self._ready):  # the others have mapped none yet
            self._send(index, Release(segment))

    def progress(self, index: int) -> tuple[int, str]:
        """Return the record that a worker reads (NO_RECORD: none) and its stage (empty: none)."""
        record, stage = self._shared_progress[index].tolist()  # two words that the worker may write in between
        return record, STAGES[stage] if 0 <= stage < len(STAGES) else ""

    def trace(self) -> bytes:
        """Return bytes that change with every step of a worker."""
        return self._shared_progress.tobytes()

    def spawn_due(self, now: float) -> None:
        """Spawn the workers whose pause is over."""
        due = [index for at, index in self._due_spawns if at <= now]
        self._due_spawns = [spawn for spawn in self._due_spawns if spawn[0] > now]
        for index in due:
            try:
                self._spawn(index)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                # A burst of connections can take all descriptors until the dispatcher has closed those beyond its limit.
                self._due_spawns.append((now + RESPAWN_PAUSE_S, index))

    def kill_if_stalled(self, index: int, pid: int, lease: int | None, now: float) -> None:
        """Kill a worker that has been at one record for too long: it is stopped, or hangs in a read.

        Args:
            index: the worker.
            pid: its process; 0 if not known yet.
            lease: number of the lease that it writes; None if it has none.
            now: time in seconds, on a monotonic clock.
        """
        if lease is None:
            self._last_moves.pop(index, None)
            return
        record, stage = self.progress(index)
        last = self._last_moves.get(index)
        if last is None or last[:2] != (lease, record):  # a new lease is progress, even at the same record
            self._last_moves[index] = (lease, record, now)
        elif now - last[2] > self._stall_s and pid:
            facts = {"worker": index, "pid": pid, "record": record, "stage": stage}
            log.warning(
                "worker %d (pid %d) has been at record %d for %.0f s: killed", index, pid, record, now - last[2], extra=facts
            )  # fmt: skip
            self._last_moves.pop(index)
            os.kill(pid, signal.SIGKILL)  # SIGTERM would not reach a stopped process

    def close(self) -> None:
        """Kill all workers, end the fork server, and wait until they are gone."""
        self._fork_server.close()
        for link in self._links.values():
            link.close()

    def _send(self, index: int, order: Lease | Release) -> None:
        try:
            self._links[index].send(encode(order))
        except (BrokenPipeError, ConnectionResetError, KeyError):  # KeyError: its link is closed already
            log.debug("worker %d has died before it could read its order", index)
        except BlockingIOError:
            # The buffer holds hundreds of orders. The worker was stopped while it had no lease, and its maps keep memory.
            if pid := self._pids.pop(index, 0):  # once
                log.warning("worker %d (pid %d) does not read its orders: killed", index, pid)
                os.kill(pid, signal.SIGKILL)

    def _spawn(self, index: int) -> None:
        link = self._fork_server.spawn_worker(index)
        self._links[index] = link
        self._by_descriptor[link.fileno()] = index
        self._poller.register(link.fileno(), zmq.POLLIN)

    def _close_link(self, index: int) -> None:
        link = self._links.pop(index, None)
        if link is not None:
            self._poller.unregister(link.fileno())  # before close: the kernel gives the number to the next socket
            del self._by_descriptor[link.fileno()]
            link.close()

    def _receive_from_worker(self, index: int) -> Iterator[tuple[int, Event]]:
        link = self._links[index]
        while True:
            try:
                packet = link.recv(MAX_PACKET_BYTES)
            except BlockingIOError:  # all read; or poll meant a closed link that had this descriptor
                return
            except ConnectionResetError:  # it died with an unread lease; the packets before that can still be read
                continue
            if not packet:  # the worker ended; the fork server reports how
                self._close_link(index)
                return
            answer = decode_answer(packet)
            if isinstance(answer, Ready):
                self._ready.add(index)
                self._failed_starts = 0
            yield index, answer

    def _receive_from_fork_server(self) -> Iterator[tuple[int, Event]]:
        match self._fork_server.receive():
            case Forked() as forked:
                self._pids[forked.index] = forked.pid
                yield forked.index, forked
            case Died(index, pid, code):
                if index in self._links:  # slices that it finished before it died count
                    yield from self._receive_from_worker(index)
                self._close_link(index)
                yield index, self._reap(index, pid, code)
            case None:
                raise NodeFailed("its fork server was killed, and its workers with it; restart the node")

    def _reap(self, index: int, pid: int, code: int) -> Death:
        """Log the death of a worker, schedule its replacement, and return the event."""
        # Both columns; NO_RECORD is Stage.NONE, too.
        record, self._shared_progress[index] = int(self._shared_progress[index, 0]), NO_RECORD
        self._last_moves.pop(index, None)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        at = f" at record {record}" if record != NO_RECORD else ""
        facts = {"worker": index, "pid": pid, "record": record}
        log.warning("worker %d (pid %d) ended by %s%s; a new one takes its place", index, pid, how, at, extra=facts)
        # Only deaths before Ready count: a worker that was ready may have died of a record, and the next one will start.
        self._failed_starts = 0 if index in self._ready else self._failed_starts + 1
        self._ready.discard(index)
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise NodeFailed(f"{MAX_FAILED_STARTS} workers in a row ended before they were ready, by {how}")
        now = time.monotonic()
        pause_s = RESPAWN_PAUSE_S * 2 ** (self._failed_starts - 1) if self._failed_starts else 0.0
        self._due_spawns.append((now + pause_s, index))
        self.spawn_due(now)  # without a pause it is due now
        # SIGKILL and SIGTERM come from outside (an operator, the OOM killer, kill_if_stalled), so no record is at fault.
        return Death(crashed=code not in (-signal.SIGKILL, -signal.SIGTERM), record=record, how=how)
