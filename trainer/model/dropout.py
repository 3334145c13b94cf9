"""Dropout as in the paper (section 4.2): half of the outputs are zeroed in training, and all are halved at test time.

Most libraries double the kept outputs in training instead. The two differ in the scale of gradients and biases.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from trainer.model.rng import DropoutKey, dropout_bits

KEEP: Final = 0.5
"""Probability of keeping a unit, and factor of all outputs at test time. It is fixed, since one random bit decides."""


def dropout_mask(
    shape: tuple[int, int], key: DropoutKey | None, tower: int, layer: int, device: torch.device
) -> Tensor:
    """Draw a dropout mask.

    Args:
        shape: (B, U), images and units.
        key: key of the masks; None draws from torch's own generator.
        tower: number of the tower; each has its own masks.
        layer: 6 or 7.
        device: device of the units.

    Returns:
        (B, U) bool, True for kept units.
    """
    if key is None:
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(KEEP)
    count = math.prod(shape)
    # Bits are drawn on the host, so that every device and process sees the same masks, and travel packed: a byte per 8 units.
    bits_drawn = dropout_bits(key, tower, layer, count, skip=key.first * shape[1])
    packed = torch.from_numpy(bits_drawn).to(device, non_blocking=True)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    bits = (packed[:, None] >> places) & 1  # (bytes, 8), first unit in the highest bit
    return bits.flatten()[:count].view(shape).bool()


def halve(units: Tensor) -> Tensor:
    """Return (B, U) times a half: the expectation over all masks, for test time."""
    return units * KEEP
