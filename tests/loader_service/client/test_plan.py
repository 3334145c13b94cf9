"""Tests of the arithmetic of batches, ranks and resumption."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loader_service.client.plan import Schedule

SIZES = {"records": st.integers(1, 300), "batch": st.integers(1, 40), "world": st.integers(1, 7)}


@given(**SIZES, epochs=st.integers(0, 3))
def test_all_ranks_together_take_each_position_once(records: int, batch: int, world: int, epochs: int) -> None:
    """In each epoch the ranks' parts, concatenated batch by batch, are 0 .. N-1 in order."""
    ranks = [list(Schedule(records, batch, r, world, epochs, False).batches(0, 0)) for r in range(world)]
    assert len({len(plans) for plans in ranks}) == 1  # every rank steps equally often
    seen = [(p.epoch, i) for step in zip(*ranks, strict=True) for p in step for i in range(p.first, p.first + p.count)]
    assert seen == [(epoch, i) for epoch in range(epochs) for i in range(records)]
    assert all(p.count <= batch for plans in ranks for p in plans)


@given(**SIZES, drop_last=st.booleans(), data=st.data())
def test_counts_agree_with_the_batches(
    records: int, batch: int, world: int, drop_last: bool, data: st.DataObject
) -> None:
    """The computed numbers of batches and positions equal those of the batches themselves."""
    rank, position = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, records))
    schedule = Schedule(records, batch, rank, world, 1, drop_last)
    plans = list(schedule.batches(0, position))
    assert schedule.batches_left(position) == len(plans)
    assert schedule.expected(position) == sum(p.count for p in plans)


@given(**SIZES, data=st.data())
def test_another_world_continues_at_the_same_sample(records: int, batch: int, world: int, data: st.DataObject) -> None:
    """A run that stops after any batch and resumes with other batch and world sizes loses and repeats no position."""
    before = list(Schedule(records, batch, 0, world, 1, False).batches(0, 0))
    cut = before[data.draw(st.integers(0, len(before) - 1))].next
    batch2, world2 = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 7))
    rest = [Schedule(records, batch2, r, world2, 1, False).batches(0, cut) for r in range(world2)]
    seen = [i for step in zip(*rest, strict=True) for p in step for i in range(p.first, p.first + p.count)]
    assert seen == list(range(cut, records))


def test_drop_last_leaves_out_the_remainder() -> None:
    """With 10 records and batches of 4 the last 2 positions are left out; without drop_last they make a short batch."""
    kept = Schedule(10, 4, 0, 1, 1, True)
    assert [p.count for p in kept.batches(0, 0)] == [4, 4]
    assert kept.expected() == 8
    assert [p.count for p in Schedule(10, 4, 0, 1, 1, False).batches(0, 0)] == [4, 4, 2]


def test_a_billion_records_cost_nothing() -> None:
    """The counts take constant time."""
    schedule = Schedule(10**9, 128, 1, 3, 1, False)
    assert schedule.batches_left(0) == -(-(10**9) // 384)
    assert schedule.expected() == sum(10**9 // 384 * 128 for _ in (1,)) + (10**9 % 384) * 2 // 3 - (10**9 % 384) // 3
