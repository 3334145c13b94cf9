"""Dropout as the paper has it (section 4.2): outputs are dropped in training and halved in use.

Most libraries double the kept outputs in training instead; the two differ in how large gradients and biases act.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from trainer.chance import DropoutKey, dropout_bits

KEEP: Final = 0.5
"""Probability of keeping a unit, and the factor of every output in use. One fair bit decides, so it is fixed."""


def drop_half(units: Tensor, key: DropoutKey | None, tower: int, layer: int) -> Tensor:
    """Set half of the units to zero, by chance; the others stay as they are.

    Args:
        units: (B, U) floating point.
        key: which masks to draw; None takes them from torch's own generator.
        tower: whose units these are; towers have masks of their own.
        layer: 6 or 7.

    Returns:
        (B, U), same dtype and device as ``units``.
    """
    if key is None:
        return units * torch.empty_like(units).bernoulli_(KEEP)
    packed = torch.from_numpy(dropout_bits(key, tower, layer, units.numel())).to(units.device, non_blocking=True)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=units.device)
    bits = (packed[:, None] >> places) & 1  # (bytes, 8), the first unit in the highest bit
    return units * bits.flatten()[: units.numel()].view_as(units)


def halve(units: Tensor) -> Tensor:
    """What dropout is in use: the mean over all masks, (B, U) times a half."""
    return units * KEEP
