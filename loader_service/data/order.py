"""The order of an epoch: the record at any position, computed without the positions before it.

Up to TABLE_MAX records the order is an exact shuffle, kept as a table for the epochs in use. Beyond that it is a
cycle-walking Feistel network over [0, N) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), so a billion
records need neither memory nor a pass over them. Both are keyed by stream 0 of (seed, epoch); see ``draws``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.data import kernel
from loader_service.data.draws import STREAM_ORDER, STREAM_SUBSTITUTE, position_words, raw_words

TABLE_MAX: Final = 65_536
"""Largest dataset whose order is a table: its sort takes about 5 ms once an epoch, and 512 KiB."""

ROUNDS: Final = 8
"""Feistel rounds. Four make a pseudorandom permutation of wide blocks (Luby and Rackoff); narrow blocks need more."""

_Words = npt.NDArray[np.uint64]


def records_at(
    count: int, seed: int, epoch: int, start: int, n: int, *, form: str | None = None
) -> npt.NDArray[np.int64]:
    """Return the record numbers at positions start .. start + n - 1 of a shuffled epoch.

    Args:
        count: number of records in the dataset.
        seed: seed of the run, 0 .. 2**64 - 1.
        epoch: epoch, 0 .. 2**64 - 1.
        start: first position; start + n must not exceed count.
        n: number of positions.
        form: one of :data:`kernel.FORMS`; the chosen one if None.

    Returns:
        (n,) int64.

    Raises:
        ValueError: the positions are not within the epoch.
    """
    if not 0 <= start <= start + n <= count:
        raise ValueError(f"positions {start} to {start + n} are not within an epoch of {count}")
    if count <= TABLE_MAX:
        return _table(count, seed, epoch)[start : start + n]  # a view of the cached table, read-only
    keys = raw_words(seed, epoch, STREAM_ORDER, 0, ROUNDS)  # (ROUNDS,) uint64, one round key each
    if (form or kernel.chosen()) != "numpy":
        assert kernel.compiled is not None
        records = np.empty(n, np.int64)
        kernel.compiled.walk(records, start, count, keys)
        return records
    positions = np.arange(start, start + n, dtype=np.uint64)
    return _walk(positions, count, keys).astype(np.int64)


def substitute(count: int, seed: int, epoch: int, position: int, excluded: npt.NDArray[np.int64]) -> int:
    """Return the record that replaces the excluded record of a position.

    Each of the position's sixteen words of stream 2 names a candidate; the first that is not excluded is taken. If all
    sixteen are excluded, the search continues at the record after the last candidate. The result depends on the set of
    exclusions only, not on the order in which they were found.

    Args:
        count: number of records in the dataset.
        seed: seed of the run.
        epoch: epoch of the position.
        position: 0 .. count - 1.
        excluded: (k,) int64, the excluded records, ascending.

    Raises:
        ValueError: every record is excluded.
    """
    if len(excluded) >= count:
        raise ValueError(f"all {count} records are excluded")
    words = position_words(seed, epoch, STREAM_SUBSTITUTE, position, 1)[0]  # (16,) uint64
    named = (words % np.uint64(count)).astype(np.int64)  # the modulo bias is below count / 2**64
    good = named[~np.isin(named, excluded)]
    if good.size:
        return int(good[0])
    # All sixteen are excluded, so probably most of the dataset is. Some record is not: see above.
    candidate = int(named[-1])
    while candidate in excluded:  # linear, but `excluded` holds at most types.MAX_EXCLUDED records
        candidate = (candidate + 1) % count
    return candidate


@lru_cache(maxsize=8)  # at most 4 MiB per process
def _table(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return an exact shuffle, (count,) int64: record numbers sorted by one random word each.

    A stable sort of integers has one result, whatever NumPy's algorithm.
    """
    table = np.argsort(raw_words(seed, epoch, STREAM_ORDER, 0, count), kind="stable").astype(np.int64)
    table.flags.writeable = False  # callers get views of the cached table
    return table


def _walk(values: _Words, count: int, keys: _Words) -> _Words:
    """Permute each value within [0, 2**bits) until it falls below count; fewer than two steps on average."""
    # 2**bits is below 2 * count, so more than half of all values are inside.
    bits = (count - 1).bit_length()
    values = _permute(values, bits, keys)
    outside = np.flatnonzero(values >= count)
    # Cycle walking: a bijection of the power of two, repeated only for values outside, is a bijection of [0, count).
    while outside.size:
        values[outside] = _permute(values[outside], bits, keys)
        outside = outside[values[outside] >= count]
    return values


def _permute(values: _Words, bits: int, keys: _Words) -> _Words:
    """Apply one bijection of [0, 2**bits): each round mixes one half of the bits into the other, alternately."""
    # np.uint64 throughout: NumPy 1 cannot shift a np.uint64 scalar by a Python integer.
    low_bits = np.uint64(bits - bits // 2)  # with an odd number of bits the low half has one more
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    low, high = values & low_mask, values >> low_bits
    # XOR with a function of the unchanged half can be undone, so each round is a bijection of [0, 2**bits).
    for i, key in enumerate(keys):
        if i % 2 == 0:
            high = high ^ (_mix(low, key) & high_mask)
        else:
            low = low ^ (_mix(high, key) & low_mask)
    return (high << low_bits) | low


def _mix(half: _Words, key: np.uint64) -> _Words:
    """Hash up to 32 bits to 32 bits with a key: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = half + key  # wraps modulo 2**64, as SplitMix64 does
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z >> np.uint64(32)  # 32 bits suffice: counts are at most 2**48, so a half has at most 24
