"""Every random number of the trainer, as a pure function of what it is for.

Philox words are addressed, not drawn in turn (the loader does the same with its crops and flips)::

    key     = (seed, step)                                   step is 0 where there is none
    counter = (block, purpose << 32 | layer, tower, replica)

So the masks and weights of a tower are the same on whichever device or in whichever process it lives, and a resumed run
has nothing random to restore. The purpose is never 0, which keeps these words apart from the loader's under the same
seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_SEED: Final = 2**63 - 1
"""A seed is one word of Philox's key, and must fit the signed integers of file formats too."""

_WORD_BITS: Final = 64


class Purpose(IntEnum):
    """What random words are for; part of their address."""

    WEIGHTS = 1
    DROPOUT = 2


@dataclass(frozen=True)
class DropoutKey:
    """Which dropout masks a forward pass draws.

    Fields:
        seed: the run's.
        step: how many updates the weights have had.
        replica: which copy of the network this is; each sees other images, so it needs masks of its own.
    """

    seed: int
    step: int
    replica: int = 0


def dropout_bits(key: DropoutKey, tower: int, layer: int, count: int) -> npt.NDArray[np.uint8]:
    """One fair bit for each unit (the paper drops half of them, section 4.2), packed eight to a byte.

    Returns:
        (ceil(count / 8),) uint8; unit i is bit ``7 - i % 8`` of byte ``i // 8``, in C order of (image, unit).
    """
    words = _philox(key.seed, key.step, Purpose.DROPOUT, layer, tower, key.replica).random_raw(-(-count // _WORD_BITS))
    # Little-endian whatever the machine, so that the masks are the same everywhere.
    return words.astype("<u8", copy=False).view(np.uint8)[: -(-count // 8)]


def normal_weights(seed: int, tower: int, layer: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Draws from N(0, 1) for the weights of one layer of one tower: float32 of ``shape``."""
    generator = np.random.Generator(_philox(seed, 0, Purpose.WEIGHTS, layer, tower, 0))
    return generator.standard_normal(shape, dtype=np.float32)


def _philox(seed: int, step: int, purpose: Purpose, layer: int, tower: int, replica: int) -> np.random.Philox:
    key = np.array([seed, step], np.uint64)
    counter = np.array([0, purpose << 32 | layer, tower, replica], np.uint64)
    return np.random.Philox(counter=counter, key=key)
