"""The watchdog: when it reports a standstill, and the place that it names."""

from __future__ import annotations

import pytest

from loader_service.node.watchdog import Culprit, Waiting, Watchdog, culprit
from loader_service.types import StageSeconds
from loader_service.wire.messages import WorkerState, WorkerStatus


def _worker(state: WorkerState, stage: str = "", record: int = -1) -> WorkerStatus:
    return WorkerStatus(7, state, 0, 0, 0.0, StageSeconds(), stage, record)


def test_a_standstill_is_reported_once() -> None:
    """A standstill of five seconds is reported once, and again after progress and another standstill."""
    dog = Watchdog(5.0)
    reports = [dog.look(now, "a", 3) for now in (0.0, 4.9, 5.0, 6.0, 60.0)]
    assert reports == [None, None, 5.0, None, None]
    assert [dog.look(now, "b", 3) for now in (61.0, 65.0, 66.5)] == [None, None, 5.5]


def test_nothing_asked_is_no_standstill() -> None:
    """A node without requests is never reported; the five seconds begin with the first request."""
    dog = Watchdog(5.0)
    assert [dog.look(now, "a", 0) for now in (0.0, 10.0, 100.0)] == [None, None, None]
    assert [dog.look(now, "a", 1) for now in (104.0, 105.0)] == [None, 5.0]


@pytest.mark.parametrize(
    ("workers", "found", "sentence"),
    [
        (
            [_worker(WorkerState.WORKING), _worker(WorkerState.WORKING, "read", 812)],
            Culprit("read", 1, 7, 812),
            "worker 1 (pid 7) is in stage read at record 812",
        ),
        (
            [_worker(WorkerState.IDLE), _worker(WorkerState.WORKING)],
            Culprit(Waiting.LEASE, 1, 7),
            "worker 1 (pid 7) is in stage lease",
        ),
        ([_worker(WorkerState.STARTING)], Culprit(Waiting.START), "no worker is ready"),
        (
            [_worker(WorkerState.IDLE)],
            Culprit(Waiting.SEND),
            "no worker has a lease; slices on their way to clients hold all send slots",
        ),
    ],
)
def test_the_place_of_a_standstill(workers: list[WorkerStatus], found: Culprit, sentence: str) -> None:
    """The place is a worker in a stage, else a worker with a lease, else the send slots or the start."""
    assert culprit(workers) == found
    assert str(found) == sentence
