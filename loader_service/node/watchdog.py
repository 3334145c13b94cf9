"""The watchdog: it detects that a node makes no progress and finds the stage, worker and record where it stands.

This file uses no clock, process or log; the time and the node's state come in, and a report goes out. The states of
:class:`Watchdog`::

    state       event at a look                         next state
    any         no slice is requested, or progress      MOVING, from now on
    MOVING      no progress for ``after_s``             REPORTED: look() returns the seconds
    REPORTED    still no progress                       REPORTED: look() returns None

Invariant: each standstill is reported once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loader_service.wire.messages import WorkerState, WorkerStatus


class Waiting(StrEnum):
    """Stages of a standstill in addition to the stages of a slice (``types.STAGES``)."""

    START = "start"
    """No worker is ready."""
    LEASE = "lease"
    """A worker holds a lease but is in no stage of a slice: it was stopped between two, or waits for a segment."""
    SEND = "send"
    """No worker holds a lease: clients do not read, so that no send slot is free."""


@dataclass(frozen=True)
class Culprit:
    """The place of a standstill.

    Fields:
        stage: one of ``types.STAGES`` or :class:`Waiting`.
        worker, pid: index and process of the worker; -1 and 0 if no worker is the place.
        record: number of the record that it reads; -1 if none.
    """

    stage: str
    worker: int = -1
    pid: int = 0
    record: int = -1

    def __str__(self) -> str:
        if self.worker < 0:
            return {
                Waiting.START: "no worker is ready",
                Waiting.SEND: "no worker has a lease; slices on their way to clients hold all send slots",
            }[Waiting(self.stage)]
        at = f" at record {self.record}" if self.record >= 0 else ""
        return f"worker {self.worker} (pid {self.pid}) is in stage {self.stage}{at}"


class Watchdog:
    """A detector of standstills.

    Args:
        after_s: seconds without progress, although slices are requested, that count as a standstill.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._seen: object = None  # equals no state, so the first look counts as progress
        self._since = 0.0
        self._reported = False

    def look(self, now: float, state: object, asked: int) -> float | None:
        """Return the seconds of a standstill that was not reported yet, or None.

        Args:
            now: time in seconds, on a monotonic clock.
            state: any value that changes with every progress of the node.
            asked: number of slices that are requested; without any, there is no standstill.
        """
        if not asked or state != self._seen:
            self._seen, self._since, self._reported = state, now, False
        elif not self._reported and now - self._since >= self._after_s:
            self._reported = True
            return now - self._since
        return None


def culprit(workers: Sequence[WorkerStatus]) -> Culprit:
    """Find the place of a standstill: a worker in a stage, else a worker with a lease, else the send slots or the start."""
    working = [(index, w) for index, w in enumerate(workers) if w.state is WorkerState.WORKING]
    for index, w in working:
        if w.stage:
            return Culprit(w.stage, index, w.pid, w.record)
    for index, w in working:
        return Culprit(Waiting.LEASE, index, w.pid)  # the first will do: no worker is in a stage
    # An idle worker with requests waiting lacks only a send slot.
    return Culprit(Waiting.SEND if any(w.state is WorkerState.IDLE for w in workers) else Waiting.START)
