"""Normalisation of the network's input: uint8 pixels minus the mean image (paper section 2).

The result stays on the scale 0 to 255: a division by the standard deviation would leave almost no signal at the logits,
with weights of std .01. Cast to float32, subtraction and channels-last layout are one pass over the batch, on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.presets import Preset


@dataclass(frozen=True)
class Facts:
    """Facts about a split. Checkpoints carry them, so a network can be used without its data.

    Fields:
        count: records in the split.
        class_names: names of the classes, in the order of the labels.
        fingerprint: fingerprint of the split's logical records.
        mean: (side, side, 3) float32, mean image of the training split, R, G, B in 0 to 255; ``side`` is the records'.
        crop: side of the network's input, in pixels.
    """

    count: int
    class_names: tuple[str, ...]
    fingerprint: str
    mean: Tensor
    crop: int


@dataclass(frozen=True)
class Windows:
    """Positions of P crops in their records, on one device: the crops', where GPUs are concerned, so that nothing waits.

    Fields:
        y, x: (P,) int64, first row and column, before the flip.
        flip: (P,) bool, True for mirrored crops.
    """

    y: Tensor
    x: Tensor
    flip: Tensor

    @classmethod
    def centre(cls, count: int, record_side: int, crop_side: int, device: torch.device | None = None) -> Windows:
        """Return the centre crops of ``count`` records, not mirrored, on ``device`` (default: the CPU)."""
        first = torch.full((count,), (record_side - crop_side) // 2, device=device)
        return cls(first, first, torch.zeros(count, dtype=torch.bool, device=device))

    def to(self, device: torch.device) -> Windows:
        """Return the same positions on ``device``."""
        return Windows(self.y.to(device), self.x.to(device), self.flip.to(device))


class MeanSubtraction:
    """Subtraction of the mean image from batches of crops.

    Args:
        mean: (side, side, 3) float32, mean image of the training split.
        preset: decides if the window of the mean follows each crop, or is always the centre (the authors' code).
        devices: devices of the batches.
    """

    def __init__(self, mean: Tensor, preset: Preset, devices: Sequence[torch.device]) -> None:
        self._follows_crop = preset.mean_follows_crop
        both = torch.stack([mean, mean.flip(1)])  # (2, side, side, 3): the mean and its mirror image
        self._means = {device: both.to(device) for device in devices}

    def __call__(self, images: Sequence[Tensor], windows: Sequence[Windows]) -> list[Tensor]:
        """Subtract the mean from a batch of P crops.

        Args:
            images: for each device (P, S, S, 3) uint8, R, G, B.
            windows: for each device positions of the P crops.

        Returns:
            For each device (P, 3, S, S) float32, channels-last, -255 to 255.
        """
        return [self._on_device(*pair) for pair in zip(images, windows, strict=True)]

    def _on_device(self, images: Tensor, windows: Windows) -> Tensor:
        means = self._means[images.device]
        side, record_side = images.shape[1], means.shape[1]
        if not self._follows_crop:
            windows = Windows.centre(len(images), record_side, side, images.device)
        # A mirrored crop reads the mirrored mean, where its window starts at the other edge.
        x = torch.where(windows.flip, record_side - side - windows.x, windows.x)
        # A CPU call is cheap and memory traffic is not; on a GPU the launches of a loop would take longer than the work.
        subtract = subtract_by_loop if images.device.type == "cpu" else subtract_at_once
        return subtract(images, means, windows.flip, windows.y, x)


def subtract_by_loop(images: Tensor, means: Tensor, which: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Subtract the window of each crop, one by one: least memory traffic, best on a CPU.

    Args:
        images: (P, S, S, 3) uint8.
        means: (2, M, M, 3) float32, on the same device as all arguments: the mean image and its mirror image.
        which: (P,) bool, index into ``means``.
        y: (P,) int64, first row of each window.
        x: (P,) int64, first column of each window.

    Returns:
        (P, 3, S, S) float32, channels-last.
    """
    side = images.shape[1]
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for i, (mean, top, left) in enumerate(zip(which.tolist(), y.tolist(), x.tolist(), strict=True)):
        torch.sub(images[i], means[int(mean), top : top + side, left : left + side], out=out[i])
    return out.permute(0, 3, 1, 2)  # a view; its memory is channels-last


def subtract_at_once(images: Tensor, means: Tensor, which: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Subtract all windows in two operations, best on a GPU; arguments and result as in ``subtract_by_loop``."""
    side = images.shape[1]
    windows = means.unfold(1, side, 1).unfold(2, side, 1)  # a view, (2, M - S + 1, M - S + 1, 3, S, S)
    # Indices of int64 on the device: a bool would be a mask, whose size the host would have to wait for.
    return torch.sub(images.permute(0, 3, 1, 2), windows[which.long(), y, x])
