"""All random numbers of the trainer, as pure functions of their use.

Philox words are addressed, not drawn in sequence, as in the loader for crops and flips::

    key     = (seed, step)                                   step is 0 where there is none
    counter = (block, purpose << 32 | layer, tower, replica)

So the masks and weights of a tower do not depend on its device or process, and a resumed run has no random state to
restore. The purpose is never 0, which separates these words from the loader's under the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_SEED: Final = 2**63 - 1
"""Largest seed: one word of Philox's key that also fits the signed integers of file formats."""

_WORD_BITS: Final = 64


class Purpose(IntEnum):
    """Uses of random words; part of their address."""

    WEIGHTS = 1
    DROPOUT = 2


@dataclass(frozen=True)
class DropoutKey:
    """The key of the dropout masks of one forward pass.

    Fields:
        seed: seed of the run.
        step: updates of the weights so far.
        replica: number of the network's copy; each copy sees other images and needs other masks.
    """

    seed: int
    step: int
    replica: int = 0


def dropout_bits(key: DropoutKey, tower: int, layer: int, count: int) -> npt.NDArray[np.uint8]:
    """Return one fair bit for each unit (the paper drops half of them, section 4.2), packed eight to a byte.

    Returns:
        (ceil(count / 8),) uint8; unit i is bit ``7 - i % 8`` of byte ``i // 8``, in C order of (image, unit).
    """
    words = _philox(key.seed, key.step, Purpose.DROPOUT, layer, tower, key.replica).random_raw(-(-count // _WORD_BITS))
    # Little-endian on every machine, so that the masks are the same everywhere.
    return words.astype("<u8", copy=False).view(np.uint8)[: -(-count // 8)]


def normal_weights(seed: int, tower: int, layer: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return draws from N(0, 1) for the weights of one layer of one tower, float32 of ``shape``."""
    # Step and replica are 0: all replicas start with the same weights.
    generator = np.random.Generator(_philox(seed, 0, Purpose.WEIGHTS, layer, tower, 0))
    return generator.standard_normal(shape, dtype=np.float32)


def _philox(seed: int, step: int, purpose: Purpose, layer: int, tower: int, replica: int) -> np.random.Philox:
    key = np.array([seed, step], np.uint64)  # separate words: adding them would make (0, 1) equal (1, 0)
    counter = np.array([0, purpose << 32 | layer, tower, replica], np.uint64)
    return np.random.Philox(counter=counter, key=key)
