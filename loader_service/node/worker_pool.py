"""The workers as processes: started, heard, watched, buried and replaced.

The worker pool knows pids, socket pairs and deaths; who works on what is the scheduler's business.
"""

from __future__ import annotations

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
from loader_service.node.packets import MAX_PACKET_BYTES, Bad, Died, Done, Forked, Lease, Ready, decode_answer, encode
from loader_service.node.worker import NO_RECORD
from loader_service.types import STAGES

log = logging.getLogger("loader_service.node")

MAX_FAILED_STARTS: Final = 5
"""Workers that die before they were ready, one after another, until the node says that it cannot go on."""

RESPAWN_PAUSE_S: Final = 0.1
"""Before a worker is replaced that died before it was ready; doubled with each of them."""


@dataclass(frozen=True)
class Death:
    """A worker's process is gone.

    Fields:
        crashed: whether by its own doing (a fault, an exception), not by somebody's kill.
        record: what it was working on, as it had published; NO_RECORD if nothing.
        how: for people.
    """

    crashed: bool
    record: int
    how: str


Event = Forked | Ready | Done | Bad | Death


class WorkerPool:
    """The processes of one node's workers.

    Args:
        fork_server: forks them.
        at: (workers, 2) int64, shared with them: the record and the stage each is working at, -1 for none.
        poller: the dispatcher's; the worker pool's descriptors come and go in it.
        stall_s: a worker that has been at one record for so long is stopped or hung, and is killed.
    """

    def __init__(self, fork_server: ForkServer, at: npt.NDArray[np.int64], poller: zmq.Poller, stall_s: float) -> None:
        self._fork_server, self._at, self._poller, self._stall_s = fork_server, at, poller, stall_s
        self._links: dict[int, socket.socket] = {}  # by worker index
        self._by_descriptor: dict[int, int] = {}
        self._ready: set[int] = set()
        self._progress: dict[int, tuple[int, int, float]] = {}  # by worker: its lease and record, and since when
        self._failed_starts = 0
        self._due_spawns: list[tuple[float, int]] = []
        poller.register(fork_server.link.fileno(), zmq.POLLIN)
        for index in range(len(at)):
            self._spawn(index)

    def receive(self, descriptor: int) -> Iterator[tuple[int, Event]]:
        """What has happened, if a readable descriptor is the worker pool's: the worker's index, and what it said or became.

        Raises:
            NodeFailed: the fork server is gone, or workers die before they are ready, again and again.
        """
        if descriptor == self._fork_server.link.fileno():
            yield from self._receive_from_fork_server()
        elif descriptor in self._by_descriptor:
            yield from self._receive_from_worker(self._by_descriptor[descriptor])

    def give(self, index: int, lease: Lease) -> None:
        """Send a worker a lease; if it has died, its death will be heard of, and the lease is part of it."""
        try:
            self._links[index].send(encode(lease))
        except (BrokenPipeError, ConnectionResetError, KeyError):
            log.debug("worker %d has died; its lease %d will be given to another", index, lease.id)

    def at(self, index: int) -> tuple[int, str]:
        """The record a worker is at, NO_RECORD for none, and its stage, empty for none."""
        record, stage = self._at[index].tolist()
        return record, STAGES[stage] if 0 <= stage < len(STAGES) else ""

    def trace(self) -> bytes:
        """Bytes that change whenever a worker moves on."""
        return self._at.tobytes()

    def spawn_due(self, now: float) -> None:
        """Fork the workers that are due."""
        due = [index for at, index in self._due_spawns if at <= now]
        self._due_spawns = [spawn for spawn in self._due_spawns if spawn[0] > now]
        for index in due:
            self._spawn(index)

    def kill_if_stalled(self, index: int, pid: int, lease: int | None, now: float) -> None:
        """Kill a worker that has not moved on for too long: stopped, or hung in a read.

        Args:
            index: which worker.
            pid: its process; 0 if it is not known yet.
            lease: the one it has in work; None if it has none.
            now: seconds on a clock that never goes back.
        """
        if lease is None:
            self._progress.pop(index, None)
            return
        record, stage = self.at(index)
        last = self._progress.get(index)
        if last is None or last[:2] != (lease, record):
            self._progress[index] = (lease, record, now)
        elif now - last[2] > self._stall_s and pid:
            facts = {"worker": index, "pid": pid, "record": record, "stage": stage}
            log.warning(
                "worker %d (pid %d) has been at record %d for %.0f s: killed", index, pid, record, now - last[2], extra=facts
            )  # fmt: skip
            self._progress.pop(index)
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End all workers and the fork server, and wait until they are gone."""
        self._fork_server.close()
        for link in self._links.values():
            link.close()

    def _spawn(self, index: int) -> None:
        link = self._fork_server.spawn_worker(index)
        self._links[index] = link
        self._by_descriptor[link.fileno()] = index
        self._poller.register(link.fileno(), zmq.POLLIN)

    def _close_link(self, index: int) -> None:
        link = self._links.pop(index, None)
        if link is not None:
            self._poller.unregister(link.fileno())
            del self._by_descriptor[link.fileno()]
            link.close()

    def _receive_from_worker(self, index: int) -> Iterator[tuple[int, Event]]:
        link = self._links[index]
        while True:
            try:
                packet = link.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it died with a lease unread; what it had said before can still be read
                continue
            if not packet:  # the fork server will tell how it died
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
                yield forked.index, forked
            case Died(index, pid, code):
                if index in self._links:
                    yield from self._receive_from_worker(index)  # what it still said counts
                self._close_link(index)
                yield index, self._reap(index, pid, code)
            case None:
                raise NodeFailed("its fork server was killed, and with it the workers; start it again")

    def _reap(self, index: int, pid: int, code: int) -> Death:
        record, self._at[index] = int(self._at[index, 0]), NO_RECORD
        self._progress.pop(index, None)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        at = f" at record {record}" if record != NO_RECORD else ""
        facts = {"worker": index, "pid": pid, "record": record}
        log.warning("worker %d (pid %d) ended by %s%s; a new one takes its place", index, pid, how, at, extra=facts)
        self._failed_starts = 0 if index in self._ready else self._failed_starts + 1
        self._ready.discard(index)
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise NodeFailed(f"{MAX_FAILED_STARTS} workers in a row ended before they were ready, by {how}")
        now, pause_s = (
            time.monotonic(),
            RESPAWN_PAUSE_S * 2 ** (self._failed_starts - 1) if self._failed_starts else 0.0,
        )
        self._due_spawns.append((now + pause_s, index))
        self.spawn_due(now)
        return Death(crashed=code not in (-signal.SIGKILL, -signal.SIGTERM), record=record, how=how)
