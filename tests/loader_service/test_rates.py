"""The rule that names a node's bottleneck, case by case."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loader_service.rates import between
from loader_service.types import StageSeconds
from loader_service.wire.messages import ClientStatus, Status, WorkerStatus


def _status(uptime_s: float, workers: list[WorkerStatus], **fields: Any) -> Status:
    values: dict[str, Any] = {
        "protocol": 1,
        "instance": "0" * 32,
        "version": "1",
        "address": "tcp://127.0.0.1:5555",
        "uptime_s": uptime_s,
        "memory_ceiling_bytes": 0,
        "splits": {},
        "workers": tuple(workers),
        "clients": (ClientStatus("one", "shm", 0, 0, 0),),
        "leases": 0,
        "reassigned": 0,
        "restarts": 0,
        "refused": 0,
        "send_slots": 4,
        **fields,
    }
    return Status(**values)


def _worker(samples: int = 0, busy_s: float = 0.0, stages: StageSeconds | None = None, stage: str = "") -> WorkerStatus:
    return WorkerStatus(1, "working", samples, samples, busy_s, stages or StageSeconds(), stage)


IDLE = _worker()
BEFORE = _status(10, [IDLE, IDLE])


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (_status(12, [IDLE, IDLE], clients=()), "idle"),
        (_status(12, [IDLE, IDLE]), "trainer"),
        (_status(12, [_worker(stage="read"), _worker(stage="read")], leases=2), "read"),
        (_status(12, [IDLE, IDLE], queued=3), "network"),
        (_status(12, [_worker(9, 1.5, StageSeconds(1.0, 0, 0.5)), _worker(9, 1.9, StageSeconds(1.0, 0, 0.9))]), "read"),
        (_status(12, [_worker(9, 1.9, StageSeconds(0.2, 1.2, 0.5)), _worker(9, 1.9)]), "decode"),
        (_status(12, [_worker(9, 1.9, StageSeconds(0.2, 0, 1.7)), _worker(9, 1.1)]), "augment"),
        (_status(12, [_worker(9, 1.0), _worker(9, 1.0)], send_s=1.6), "network"),
        (_status(12, [_worker(9, 1.0), _worker(9, 1.0)], send_s=1.4), "trainer"),
        (_status(12, [_worker(9, 1.49), _worker(9, 1.49)]), "trainer"),
    ],
)
def test_the_bottleneck(after: Status, what: str) -> None:
    """Two seconds of two workers: the first rule that applies names what holds the node up."""
    assert between(BEFORE, after).bottleneck.what == what


def test_rates_are_differences() -> None:
    """Per worker, per client and in all; where the workers' time went adds up to one."""
    before = _status(10, [_worker(100, 1.0), _worker(50, 1.0)], samples=150, delivered_bytes=1500, clients=())
    after = _status(
        14,
        [_worker(300, 3.0, StageSeconds(0.5, 0, 1.0)), _worker(50, 1.0)],
        samples=350,
        delivered_bytes=3500,
        clients=(ClientStatus("new", "tcp", 1, 2, 200),),
    )
    rates = between(before, after)
    assert (rates.interval_s, rates.samples, rates.delivered_bytes) == (4, 50, 500)
    assert rates.workers == (50, 0)
    assert rates.clients == (50,)
    assert rates.busy == 0.25
    assert rates.stages == {"read": 0.25, "decode": 0.0, "augment": 0.5, "other": 0.25}


@pytest.mark.parametrize("first", ["none", "another node"])
def test_without_a_first_answer_rates_are_since_the_start(first: str) -> None:
    """A node that was restarted in between has begun anew, and its sums are not taken from its predecessor's."""
    after = _status(4, [_worker(200, 2.0)], samples=200, clients=(ClientStatus("one", "shm", 0, 9, 200),))
    before = None if first == "none" else msgspec.structs.replace(BEFORE, instance="1" * 32, samples=10**6)
    rates = between(before, after)
    assert (rates.samples, rates.workers, rates.clients, rates.busy) == (50, (50,), (50,), 0.5)
