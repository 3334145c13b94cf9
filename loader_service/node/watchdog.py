"""When nothing moves: noticed once per standstill, and told with the stage, the worker and the record.

Rules of this file: no clocks, processes or logs. The time and what is known come in; what is to be said comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loader_service.wire.messages import WorkerState, WorkerStatus


class Waiting(StrEnum):
    """Stages of a standstill outside of those of a worker (``types.STAGES``)."""

    START = "start"
    LEASE = "lease"
    SEND = "send"


@dataclass(frozen=True)
class Culprit:
    """Where the work stands still: the stage, and the worker and record if one is at it (else -1)."""

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
    """Notices a standstill.

    Args:
        after_s: how long nothing may move, though something is asked for, before it is one.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._seen: object = None
        self._since = 0.0
        self._told = False

    def look(self, now: float, state: object, asked: int) -> float | None:
        """Seconds of standstill, once for each; None if there is none, or it has been told.

        Args:
            now: seconds on a clock that never goes back.
            state: anything that is another value as soon as something has moved.
            asked: how many slices are asked for; with none there is nothing to stand still.
        """
        if not asked or state != self._seen:
            self._seen, self._since, self._told = state, now, False
        elif not self._told and now - self._since >= self._after_s:
            self._told = True
            return now - self._since
        return None


def culprit(workers: Sequence[WorkerStatus]) -> Culprit:
    """Who holds up a node that stands still: a worker in a stage, else one with a lease, else none of them."""
    working = [(index, w) for index, w in enumerate(workers) if w.state is WorkerState.WORKING]
    for index, w in working:
        if w.stage:
            return Culprit(w.stage, index, w.pid, w.record)
    for index, w in working:  # stopped between two slices, or waiting for a client's memory
        return Culprit(Waiting.LEASE, index, w.pid)
    return Culprit(Waiting.SEND if any(w.state is WorkerState.IDLE for w in workers) else Waiting.START)
