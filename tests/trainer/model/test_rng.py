"""Addressed random numbers: each part of an address matters, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.model.rng import DropoutKey, dropout_bits, normal_weights

UNITS = 1 << 16


def units(key: DropoutKey, tower: int = 0, layer: int = 6) -> np.ndarray:
    return np.unpackbits(dropout_bits(key, tower, layer, UNITS))


def test_dropout_bits_golden() -> None:
    """The masks are pinned: other ones would change resumed runs."""
    assert dropout_bits(DropoutKey(seed=1, step=2, replica=3), 1, 7, 64).tobytes().hex() == "6b5be0686449a9ae"


@pytest.mark.parametrize(
    ("key", "tower", "layer"),
    [
        (DropoutKey(1, 0), 0, 6),
        (DropoutKey(0, 1), 0, 6),
        (DropoutKey(0, 0, 1), 0, 6),
        (DropoutKey(0, 0), 1, 6),
        (DropoutKey(0, 0), 0, 7),
    ],
    ids=["seed", "step", "replica", "tower", "layer"],
)
def test_each_part_of_the_address_gives_independent_masks(key: DropoutKey, tower: int, layer: int) -> None:
    """Masks whose addresses differ in one part agree in about half of the units."""
    agreement = (units(DropoutKey(0, 0)) == units(key, tower, layer)).mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / np.sqrt(UNITS)


def test_half_of_the_units_are_kept() -> None:
    """The share of kept units is a half, within four standard errors."""
    assert abs(units(DropoutKey(0, 0)).mean() - 0.5) < 4 * 0.5 / np.sqrt(UNITS)


def test_seed_and_step_are_not_added() -> None:
    """(seed 0, step 1) and (seed 1, step 0) give different masks."""
    assert not np.array_equal(units(DropoutKey(0, 1)), units(DropoutKey(1, 0)))


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 65, 1000])
def test_dropout_bits_of_any_count(count: int) -> None:
    """Any count gives just enough bytes, and a shorter draw is a prefix of a longer one."""
    bits = dropout_bits(DropoutKey(0, 0), 0, 6, count)
    assert len(bits) == -(-count // 8)
    assert bits.tobytes() == dropout_bits(DropoutKey(0, 0), 0, 6, 2000).tobytes()[: len(bits)]


def test_normal_weights_are_standard_normal() -> None:
    """Mean 0 and standard deviation 1, within four standard errors."""
    weights = normal_weights(0, 0, 1, (UNITS,))
    assert weights.dtype == np.float32
    assert abs(weights.mean()) < 4 / np.sqrt(UNITS)
    assert abs(weights.std() - 1) < 4 / np.sqrt(2 * UNITS)
