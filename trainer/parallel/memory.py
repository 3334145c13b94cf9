"""What would fit: when a GPU's memory is too small for a batch, two small ones tell how much each image needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from trainer.errors import DeviceError

_TRIALS: Final = (4, 8)
"""Images in the two batches that are tried."""

_MARGIN: Final = 0.9
"""Share of the memory that is counted on: the rest is lost between blocks."""


def too_large(batch: int, devices: Sequence[torch.device], trial: Callable[[int], None] | None) -> DeviceError:
    """The error for a batch that was too large, with one that would fit.

    Args:
        batch: images in it.
        devices: that it was computed on.
        trial: makes a step with that many images; None where that is not possible alone.
    """
    fits = min((batch_that_fits(device, trial, batch) for device in set(devices)), default=0) if trial else 0
    name = " and ".join(map(str, dict.fromkeys(devices)))
    advice = f"about {fits} images would fit: try --batch-size {fits}" if fits else "try a smaller --batch-size"
    return DeviceError(name, f"its memory is too small for a batch of {batch} images; {advice}, or more --devices")


def batch_that_fits(device: torch.device, trial: Callable[[int], None], asked: int) -> int:
    """How many images, fewer than ``asked``, ``device`` has the memory for; 0 if it could not be found out.

    Memory grows with the images from what the network itself needs, in a straight line.
    """
    try:
        few, more = (peak_bytes(device, trial, images) for images in _TRIALS)
    except torch.cuda.OutOfMemoryError:
        return 0
    for_each = (more - few) / (_TRIALS[1] - _TRIALS[0])
    fixed = few - _TRIALS[0] * for_each
    if for_each <= 0:
        return 0
    fits = int((_MARGIN * room_bytes(device) - fixed) / for_each)
    return max(0, min(asked - 1, fits // 8 * 8 if fits >= 8 else fits))


def peak_bytes(device: torch.device, trial: Callable[[int], None], images: int) -> int:
    """The most memory that torch has had in use on ``device`` during a step with ``images`` images."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    trial(images)
    return torch.cuda.max_memory_allocated(device)


def room_bytes(device: torch.device) -> int:
    """What torch may have of ``device``: what it has and what nobody has."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
