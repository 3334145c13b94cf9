"""Dropout as the paper has it (section 4.2): outputs are dropped in training and halved in use.

Most libraries double the kept outputs in training instead; the two differ in how large gradients and biases act.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from trainer.model.rng import DropoutKey, dropout_bits

KEEP: Final = 0.5
"""Probability of keeping a unit, and the factor of every output in use. One fair bit decides, so it is fixed."""


def dropout_mask(
    shape: tuple[int, int], key: DropoutKey | None, tower: int, layer: int, device: torch.device
) -> Tensor:
    """Which units stay as they are, by chance; the others are set to zero.

    Args:
        shape: (B, U), images and units.
        key: which masks to draw; None takes them from torch's own generator.
        tower: whose units these are; towers have masks of their own.
        layer: 6 or 7.
        device: where the units are.

    Returns:
        (B, U) bool.
    """
    if key is None:
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(KEEP)
    count = math.prod(shape)
    packed = torch.from_numpy(dropout_bits(key, tower, layer, count)).to(device, non_blocking=True)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    bits = (packed[:, None] >> places) & 1  # (bytes, 8), the first unit in the highest bit
    return bits.flatten()[:count].view(shape).bool()


def halve(units: Tensor) -> Tensor:
    """What dropout is in use: the mean over all masks, (B, U) times a half."""
    return units * KEEP
