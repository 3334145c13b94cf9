"""Dropout as in the paper (section 4.2): half of the outputs are zeroed in training, and all are halved at test time.

Most libraries double the kept outputs in training instead. The two differ in the scale of gradients and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.model.rng import DropoutKey, dropout_bits

KEEP: Final = 0.5
"""Probability of keeping a unit, and factor of all outputs at test time. It is fixed, since one random bit decides."""


@dataclass(frozen=True)
class DrawnMasks(DropoutKey):
    """The key of masks whose bits are on the devices already; it serves wherever a key does.

    Fields:
        bits: the bits of each (tower, layer) in each copy, packed as by ``dropout_bits``; one copy for each device.
    """

    bits: Sequence[Mapping[tuple[int, int], Tensor]] = field(kw_only=True)

    @classmethod
    def of(cls, key: DropoutKey, bits: Sequence[Mapping[tuple[int, int], Tensor]]) -> DrawnMasks:
        """Return the masks of ``key``."""
        return cls(**{each.name: getattr(key, each.name) for each in fields(DropoutKey)}, bits=bits)

    @property
    def key(self) -> DropoutKey:
        """The key alone."""
        return DropoutKey(**{each.name: getattr(self, each.name) for each in fields(DropoutKey)})

    def packed(self, tower: int, layer: int, device: torch.device) -> Tensor:
        """Return the bits of one layer of one tower on ``device``, (ceil(units of all images / 8),) uint8."""
        return next(copy[tower, layer] for copy in self.bits if copy[tower, layer].device == device)


@dataclass(frozen=True)
class MaskPlan:
    """The masks of consecutive batches, drawn before they are used, so that they travel with the images.

    Fields:
        first: key of the first batch, which begins a step.
        units: number of units of each (tower, layer) with dropout; empty if nothing is dropped.
        accumulate: batches of a step; an epoch's last step may have fewer.
        images: images of this copy of the network in every batch but an epoch's last.
        left, per_epoch: batches of the epoch of the first batch, from that one on, and of each later epoch. They do not
            matter if each batch is a step.
    """

    first: DropoutKey
    units: Mapping[tuple[int, int], int]
    accumulate: int = 1
    images: int = 0
    left: int = 0
    per_epoch: int = 1

    def key(self, number: int) -> DropoutKey:
        """Return the key of batch ``number``, from 0."""
        steps = 0  # in the epochs before this batch's
        if number >= self.left:
            epochs, number = divmod(number - self.left, self.per_epoch)
            steps = -(-self.left // self.accumulate) + epochs * -(-self.per_epoch // self.accumulate)
        step, part = divmod(number, self.accumulate)
        return replace(self.first, step=self.first.step + steps + step, first=part * self.images)

    def draw(self, number: int, images: int) -> npt.NDArray[np.uint8]:
        """Return the bits of all masks of batch ``number``, (n,) uint8: one after the other, each from a byte boundary."""
        key = self.key(number)
        masks = [
            dropout_bits(key, *place, images * units, skip=key.first * units) for place, units in self.units.items()
        ]
        return np.concatenate([np.zeros(0, np.uint8), *masks])

    def size_bytes(self, images: int) -> int:
        """Return the size of the result of ``draw``."""
        return sum(self._sizes(images))

    def drawn(self, number: int, images: int, copies: Sequence[Tensor]) -> DrawnMasks:
        """Return the masks of batch ``number``, given the result of ``draw`` on each device."""
        bits = [dict(zip(self.units, torch.split(copy, self._sizes(images)), strict=True)) for copy in copies]
        return DrawnMasks.of(self.key(number), bits)

    def _sizes(self, images: int) -> list[int]:
        return [-(-images * units // 8) for units in self.units.values()]  # whole bytes


def dropout_mask(
    shape: tuple[int, int], key: DropoutKey | None, tower: int, layer: int, device: torch.device
) -> Tensor:
    """Return a dropout mask.

    Args:
        shape: (B, U), images and units.
        key: key of the masks, which may be drawn already; None draws from torch's own generator.
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
    if isinstance(key, DrawnMasks):
        packed = key.packed(tower, layer, device)
    else:
        drawn = torch.from_numpy(dropout_bits(key, tower, layer, count, skip=key.first * shape[1]))
        # Pinned, or the copy would wait for the device.
        packed = (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    bits = (packed[:, None] >> places) & 1  # (bytes, 8), first unit in the highest bit
    return bits.flatten()[:count].view(shape).bool()


def halve(units: Tensor) -> Tensor:
    """Return (B, U) times a half: the expectation over all masks, for test time."""
    return units * KEEP
