"""The order of an epoch is a uniform permutation, computed for any position without the others."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_service.data import kernel
from loader_service.data.order import TABLE_MAX, records_at, substitute

GOLDEN_SUBSTITUTES = [146597, 573938, 986264, 757917]

words = st.integers(0, 2**64 - 1)


def chi_square(counts: np.ndarray) -> float:
    """Return the distance of counts from uniform, in standard deviations of chi-square (about normal with many cells)."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize(
    ("count", "seed", "epoch", "start", "golden"),
    [
        (10, 0, 0, 0, [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]),
        (TABLE_MAX, 2012, 60, 65_530, [53229, 61943, 14236, 21639, 42462, 9526]),
        (TABLE_MAX + 1, 2012, 60, 65_530, [60758, 36942, 57477, 31434, 14800, 27903]),
        (1_281_167, 2012, 60, 640_000, [707298, 729704, 1143047, 437997, 619289]),
        (10**9, 2012, 60, 999_999_995, [763936375, 886254480, 45738262, 659669339, 402904166]),
        (2**48, 2**64 - 1, 2**64 - 1, 2**47, [271208931133331, 99069835531582, 242667837226821, 48584466212461]),
    ],
)
def test_golden_orders(count: int, seed: int, epoch: int, start: int, golden: list[int]) -> None:
    """The order of a (count, seed, epoch) never changes."""
    assert records_at(count, seed, epoch, start, len(golden)).tolist() == golden


@given(count=st.integers(1, 500), seed=words, epoch=words)
def test_a_table_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    """An epoch of a small dataset has every record once."""
    assert np.array_equal(np.sort(records_at(count, seed, epoch, 0, count)), np.arange(count))


@settings(max_examples=12)
@given(count=st.integers(TABLE_MAX + 1, 4 * TABLE_MAX), seed=words, epoch=words)
def test_a_feistel_network_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    """An epoch of a large dataset has every record once."""
    assert np.array_equal(np.sort(records_at(count, seed, epoch, 0, count)), np.arange(count))


@given(
    count=st.sampled_from([7, 1000, TABLE_MAX, TABLE_MAX + 1, 1_281_167, 10**9, 2**48]),
    seed=words,
    epoch=words,
    data=st.data(),
)
def test_a_position_does_not_depend_on_the_cut(count: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """A position's record does not depend on how a range is cut."""
    start = data.draw(st.integers(0, count))
    n = data.draw(st.integers(0, min(300, count - start)))
    cut = data.draw(st.integers(0, n))
    parts = [records_at(count, seed, epoch, start, cut), records_at(count, seed, epoch, start + cut, n - cut)]
    assert np.array_equal(np.concatenate(parts), records_at(count, seed, epoch, start, n))


def test_every_record_is_as_likely_at_every_position_of_a_table() -> None:
    """Over many epochs of a small dataset the cells (position, record) fill evenly."""
    count, epochs = 16, 4000
    cells = np.zeros((count, count), np.int64)
    for epoch in range(epochs):
        cells[np.arange(count), records_at(count, 1, epoch, 0, count)] += 1
    assert abs(chi_square(cells)) < 4


@pytest.mark.parametrize("form", kernel.FORMS)
@given(count=st.integers(TABLE_MAX + 1, 2**48), seed=words, epoch=words, data=st.data())
def test_every_form_walks_alike(form: str, count: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """Every compiled form gives the same order as the NumPy form."""
    start = data.draw(st.integers(0, count - 1))
    n = min(50, count - start)
    expected = records_at(count, seed, epoch, start, n, form="numpy")
    assert np.array_equal(records_at(count, seed, epoch, start, n, form=form), expected)


@pytest.mark.parametrize("start", [0, 50_000, 99_999 - 4])
def test_every_record_is_as_likely_at_every_position_of_a_feistel_network(start: int) -> None:
    """Over many epochs of a large dataset a position's record falls evenly into 64 ranges."""
    count, n = 99_999, 4
    records = np.concatenate([records_at(count, 1, epoch, start, n) for epoch in range(2500)])
    assert abs(chi_square(np.bincount(records * 64 // count, minlength=64))) < 4


@pytest.mark.parametrize("count", [TABLE_MAX, 99_999, 2**17])
def test_neighbours_in_the_order_are_unrelated(count: int) -> None:
    """The distances between successive records are even over the whole dataset."""
    order = records_at(count, 3, 5, 0, count)
    gaps = np.diff(order) % count
    assert abs(chi_square(np.bincount(gaps * 256 // count, minlength=256))) < 4


@pytest.mark.parametrize("count", [10_000, 99_999])
def test_successive_epochs_are_unrelated(count: int) -> None:
    """Two epochs' orders agree in about one position, as two random permutations do."""
    orders = [records_at(count, 3, epoch, 0, count) for epoch in range(20)]
    fixed = sum(int((a == b).sum()) for a, b in pairwise(orders))
    assert 5 <= fixed <= 40  # Poisson with mean 19


def test_an_order_looks_like_any_permutation_does() -> None:
    """A Feistel order has the mean displacement, count / 3, of a random permutation."""
    count = 99_999
    moved = np.abs(records_at(count, 8, 0, 0, count) - np.arange(count)).mean()
    assert moved == pytest.approx(count / 3, rel=0.01)


@pytest.mark.parametrize("count", [1000, 100_000])
def test_seed_and_epoch_are_not_added(count: int) -> None:
    """Seed 0 in epoch 1 and seed 1 in epoch 0 have different orders."""
    assert not np.array_equal(records_at(count, 0, 1, 0, 100), records_at(count, 1, 0, 0, 100))


def test_a_billion_records_cost_no_memory() -> None:
    """A slice of a huge epoch needs memory for its own positions only."""
    records_at(10**9, 0, 0, 0, 128)
    tracemalloc.start()
    records_at(10**9, 0, 0, 5 * 10**8, 128)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


@pytest.mark.parametrize(("start", "n"), [(-1, 1), (0, 11), (10, 1), (5, -1)])
@pytest.mark.parametrize("count", [10, 10**9])
def test_positions_outside_an_epoch_are_refused(count: int, start: int, n: int) -> None:
    """Positions outside of the epoch are an error."""
    if count != 10:
        start = start if start <= 0 else start + count - 10
        n = n if n <= 1 else count + 1
    with pytest.raises(ValueError, match="not within an epoch"):
        records_at(count, 0, 0, start, n)


def test_a_substitute_depends_on_the_exclusions_only() -> None:
    """A substitute is never excluded itself, and excluding other records does not change it."""
    for position in range(200):
        alone = substitute(1000, 3, 1, position, np.array([5]))
        assert alone != 5
        others = np.array(sorted({5, *range(100, 200)} - {alone}))
        with_others = substitute(1000, 3, 1, position, others)
        assert with_others not in others
        assert with_others == alone


def test_a_substitute_is_found_while_any_record_is_good() -> None:
    """With all records but one excluded, that one is the substitute; with all of them excluded it is an error."""
    assert substitute(50, 0, 0, 7, np.array([n for n in range(50) if n != 31])) == 31
    with pytest.raises(ValueError, match="all 50 records are excluded"):
        substitute(50, 0, 0, 7, np.arange(50))


def test_golden_substitutes() -> None:
    """The rule is pinned: these positions always get these records."""
    assert [substitute(1_281_167, 2012, 60, position, np.array([0])) for position in range(4)] == GOLDEN_SUBSTITUTES
