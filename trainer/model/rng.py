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
_BLOCK_BITS: Final = 4 * _WORD_BITS
"""Philox makes four words from each value of its counter."""


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
        first: images of this copy and step before this pass. Passes over parts of a batch have the masks of one pass over
            the whole.
    """

    seed: int
    step: int
    replica: int = 0
    first: int = 0


def dropout_bits(key: DropoutKey, tower: int, layer: int, count: int, skip: int = 0) -> npt.NDArray[np.uint8]:
    """Return one fair bit for each unit (the paper drops half of them, section 4.2), packed eight to a byte.

    Args:
        key: seed, step and replica of the words; its ``first`` is not used here.
        tower: number of the tower.
        layer: number of the layer.
        count: number of units.
        skip: units before the first one.

    Returns:
        (ceil(count / 8),) uint8; unit ``skip + i`` is bit ``7 - i % 8`` of byte ``i // 8``, in C order of (image, unit).
    """
    blocks, skip = divmod(skip, _BLOCK_BITS)  # Philox jumps to a block at no cost
    philox = _philox(key.seed, key.step, Purpose.DROPOUT, layer, tower, key.replica, blocks)
    words = philox.random_raw(-(-(skip + count) // _WORD_BITS))
    # Little-endian on every machine, so that the masks are the same everywhere.
    packed = words.astype("<u8", copy=False).view(np.uint8)[skip // 8 : -(-(skip + count) // 8)]
    return np.packbits(np.unpackbits(packed)[skip % 8 : skip % 8 + count]) if skip % 8 else packed


def normal_weights(seed: int, tower: int, layer: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return draws from N(0, 1) for the weights of one layer of one tower, float32 of ``shape``."""
    # Step and replica are 0: all replicas start with the same weights.
    generator = np.random.Generator(_philox(seed, 0, Purpose.WEIGHTS, layer, tower, 0))
    return generator.standard_normal(shape, dtype=np.float32)


def _philox(
    seed: int, step: int, purpose: Purpose, layer: int, tower: int, replica: int, block: int = 0
) -> np.random.Philox:
    key = np.array([seed, step], np.uint64)  # separate words: adding them would make (0, 1) equal (1, 0)
    counter = np.array([block, purpose << 32 | layer, tower, replica], np.uint64)
    return np.random.Philox(counter=counter, key=key)
