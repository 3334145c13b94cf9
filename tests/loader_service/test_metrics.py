"""What a node and a loader say about themselves, through hooks and properties."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loader_service import Loader, LoaderMetrics, NodeMetrics, status

SAMPLE_BYTES = 224 * 224 * 3 + 8 + 12
"""Pixels, label, draws."""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_hook_sees_every_batch(node_address: str, transport: str) -> None:
    """One frozen record per batch; counters grow by what the batch held, and slots are accounted for."""
    seen: list[LoaderMetrics] = []
    with Loader(
        node_address, batch_size=100, timeout_s=20, transport=transport, prefetch=2, hook=seen.append
    ) as loader:  # type: ignore[arg-type]
        kept = next(loader)
        assert seen[-1].slots["held"] == 1
        del kept
        for _ in loader:
            pass
        last = loader.metrics
    assert [(m.batches, m.samples) for m in seen] == [(1, 100), (2, 200), (3, 300)]
    assert [m.delivered_bytes for m in seen] == [n * SAMPLE_BYTES for n in (100, 200, 300)]
    assert all(sum(m.slots.values()) == 4 for m in seen)
    assert (last.duplicates_refused, last.reassigned, last.substituted) == (0, 0, 0)
    assert last.waited_s > 0
    assert seen[0].used_s == 0 < seen[1].used_s


def test_waiting_share() -> None:
    """Waiting and using make up the whole time; before anything happened nobody has waited."""
    nothing = LoaderMetrics(0, 0, 0, 0.0, 0.0, {}, 0, 0, 0)
    assert nothing.waiting_share == 0
    assert replace(nothing, waited_s=1.0, used_s=3.0).waiting_share == 0.25


def test_a_node_counts_what_it_delivers(node_address: str) -> None:
    """One epoch more is 300 samples and their bytes more, and every worker's seconds are in some stage."""
    before = NodeMetrics.of(status(node_address))
    with Loader(node_address, batch_size=64, timeout_s=20) as loader:
        for _ in loader:
            pass
    after = NodeMetrics.of(status(node_address))
    assert after.samples - before.samples == 300
    assert after.delivered_bytes - before.delivered_bytes == 300 * SAMPLE_BYTES
    assert after.stage_s["augment"] > before.stage_s["augment"]
    assert sum(after.stage_s[s] for s in ("read", "decode", "augment")) <= after.busy_s
    assert sum(after.workers.values()) == 2
    assert after.uptime_s > before.uptime_s
