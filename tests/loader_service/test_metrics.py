"""The metrics of nodes and loaders, and the rates and the bottleneck that follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from loader_service import Loader, LoaderMetrics, NodeMetrics, status
from loader_service.metrics import Rates
from loader_service.types import StageSeconds
from loader_service.wire.messages import ClientStatus, Status, WorkerState, WorkerStatus

SAMPLE_BYTES = 224 * 224 * 3 + 8 + 12
"""Bytes of one sample: pixels, label, draws."""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_hook_sees_every_batch(node_address: str, transport: str) -> None:
    """A hook gets one record per batch; its counters grow by the batch, and its slots add up to all slots."""
    seen: list[LoaderMetrics] = []
    with Loader(
        node_address, batch_size=100, epochs=1, timeout_s=20, transport=transport, prefetch=2, hook=seen.append
    ) as loader:  # type: ignore[arg-type]
        kept = next(loader.all_epochs())
        assert seen[-1].slots["held"] == 1
        del kept
        for _ in loader.all_epochs():
            pass
        last = loader.metrics
    assert [(m.batches, m.samples) for m in seen] == [(1, 100), (2, 200), (3, 300)]
    assert [m.delivered_bytes for m in seen] == [n * SAMPLE_BYTES for n in (100, 200, 300)]
    assert all(sum(m.slots.values()) == 4 for m in seen)
    assert (last.duplicates_refused, last.reassigned, last.substituted) == (0, 0, 0)
    assert last.waited_s > 0
    assert seen[0].used_s == 0 < seen[1].used_s


def test_waiting_share() -> None:
    """The waiting share is waited time by all time, and 0 before the first batch."""
    nothing = LoaderMetrics(0, 0, 0, 0.0, 0.0, {}, 0, 0, 0)
    assert nothing.waiting_share == 0
    assert replace(nothing, waited_s=1.0, used_s=3.0).waiting_share == 0.25


def test_a_node_counts_what_it_delivers(node_address: str) -> None:
    """One epoch adds 300 samples and their bytes, and the seconds of the stages are at most the busy seconds."""
    before = NodeMetrics.of(status(node_address))
    with Loader(node_address, batch_size=64, epochs=1, timeout_s=20) as loader:
        for _ in loader:
            pass
    after = NodeMetrics.of(status(node_address))
    assert after.samples - before.samples == 300
    assert after.delivered_bytes - before.delivered_bytes == 300 * SAMPLE_BYTES
    assert after.stage_s["augment"] > before.stage_s["augment"]
    assert sum(after.stage_s[s] for s in ("read", "decode", "augment")) <= after.busy_s
    assert sum(after.workers.values()) == 2
    assert after.uptime_s > before.uptime_s


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
    return WorkerStatus(1, WorkerState.WORKING, samples, samples, busy_s, stages or StageSeconds(), stage)


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
    """The first rule that applies to two seconds of two workers names the bottleneck."""
    assert Rates.between(BEFORE, after).bottleneck.what == what


def test_rates_are_differences() -> None:
    """Rates are differences by time, per worker, per client and in all; the shares of the stages add up to one."""
    before = _status(10, [_worker(100, 1.0), _worker(50, 1.0)], samples=150, delivered_bytes=1500, clients=())
    after = _status(
        14,
        [_worker(300, 3.0, StageSeconds(0.5, 0, 1.0)), _worker(50, 1.0)],
        samples=350,
        delivered_bytes=3500,
        clients=(ClientStatus("new", "tcp", 1, 2, 200),),
    )
    rates = Rates.between(before, after)
    assert (rates.interval_s, rates.samples, rates.delivered_bytes) == (4, 50, 500)
    assert rates.workers == (50, 0)
    assert rates.clients == (50,)
    assert rates.busy == 0.25
    assert rates.stages == {"read": 0.25, "decode": 0.0, "augment": 0.5, "other": 0.25}


@pytest.mark.parametrize("first", ["none", "another node"])
def test_without_a_first_answer_rates_are_since_the_start(first: str) -> None:
    """Without a first status, or after a restart of the node, rates cover the time since its start."""
    after = _status(4, [_worker(200, 2.0)], samples=200, clients=(ClientStatus("one", "shm", 0, 9, 200),))
    before = None if first == "none" else msgspec.structs.replace(BEFORE, instance="1" * 32, samples=10**6)
    rates = Rates.between(before, after)
    assert (rates.samples, rates.workers, rates.clients, rates.busy) == (50, (50,), (50,), 0.5)
