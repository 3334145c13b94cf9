"""From uint8 pixels to what the network sees: 0 to 255 minus the mean image (paper section 2), in one operation.

The cast to float32, the subtraction and the layout (channels-last) are one pass over the batch, on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.model.presets import Preset


@dataclass(frozen=True)
class Facts:
    """A split, as its node describes it.

    Fields:
        count: records in the split.
        class_names: in the order of the labels.
        fingerprint: of the split's logical records.
        mean: (side, side, 3) float32, the training split's mean image, R, G, B in 0 to 255; as wide as the records.
        crop: the side of what the network sees of a record, in pixels.
    """

    count: int
    class_names: tuple[str, ...]
    fingerprint: str
    mean: Tensor
    crop: int


@dataclass(frozen=True)
class Windows:
    """Where in its record each picture of a batch was cut.

    Fields:
        y, x: (P,) integers, the first row and column.
        flip: (P,) bool, whether the crop was mirrored.
    """

    y: npt.NDArray[np.int64]
    x: npt.NDArray[np.int64]
    flip: npt.NDArray[np.bool_]

    @classmethod
    def centre(cls, pictures: int, record_side: int, crop_side: int) -> Windows:
        """The centre crop, unmirrored, of ``pictures`` records."""
        first = np.full(pictures, (record_side - crop_side) // 2)
        return cls(first, first, np.zeros(pictures, np.bool_))


class MeanSubtraction:
    """Subtracts the mean image.

    Args:
        mean: (side, side, 3) float32, the training split's.
        preset: whether the window that is subtracted follows the crop and its mirroring, or stays at the centre.
        devices: where batches will be.
    """

    def __init__(self, mean: Tensor, preset: Preset, devices: Sequence[torch.device]) -> None:
        self._follows_crop = preset.mean_follows_crop
        both = torch.stack([mean, mean.flip(1)])  # (2, side, side, 3): as it is, and mirrored
        self._means = {device: both.to(device) for device in devices}

    def __call__(self, images: Sequence[Tensor], windows: Windows) -> list[Tensor]:
        """MeanSubtraction a batch that lies on one or several devices.

        Args:
            images: for each device (P, S, S, 3) uint8, R, G, B.
            windows: where the P pictures were cut.

        Returns:
            For each device (P, 3, S, S) float32, channels-last.
        """
        return [self._on_device(batch, windows) for batch in images]

    def _on_device(self, images: Tensor, windows: Windows) -> Tensor:
        means = self._means[images.device]
        side, record_side = images.shape[1], means.shape[1]
        if not self._follows_crop:
            windows = Windows.centre(len(images), record_side, side)
        # A mirrored crop's window lies mirrored in the mirrored mean.
        x = np.where(windows.flip, record_side - side - windows.x, windows.x)
        subtract = subtract_by_loop if images.device.type == "cpu" else subtract_at_once
        return subtract(images, means, windows.flip, windows.y, x)


def subtract_by_loop(
    images: Tensor,
    means: Tensor,
    which: npt.NDArray[np.bool_],
    y: npt.NDArray[np.int64],
    x: npt.NDArray[np.int64],
) -> Tensor:
    """Subtract a window for each picture, one by one: least memory traffic, best where a call costs little (CPU).

    Args:
        images: (P, S, S, 3) uint8.
        means: (2, M, M, 3) float32, on the same device.
        which: (P,) bool, which of the two means.
        y: (P,) integers, the window's first row in it.
        x: (P,) integers, the window's first column.

    Returns:
        (P, 3, S, S) float32, channels-last.
    """
    side = images.shape[1]
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for i, (mean, top, left) in enumerate(zip(which.tolist(), y.tolist(), x.tolist(), strict=True)):
        torch.sub(images[i], means[int(mean), top : top + side, left : left + side], out=out[i])
    return out.permute(0, 3, 1, 2)


def subtract_at_once(
    images: Tensor,
    means: Tensor,
    which: npt.NDArray[np.bool_],
    y: npt.NDArray[np.int64],
    x: npt.NDArray[np.int64],
) -> Tensor:
    """Like ``subtract_by_loop``, in two operations however many pictures: best where a call costs much (GPU)."""
    side = images.shape[1]
    windows = means.unfold(1, side, 1).unfold(2, side, 1)  # a view, (2, places, places, 3, S, S)
    index = torch.from_numpy(np.stack([which, y, x]).astype(np.int64)).to(images.device, non_blocking=True)
    return torch.sub(images.permute(0, 3, 1, 2), windows[index[0], index[1], index[2]])
