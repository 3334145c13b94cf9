"""Devices of the towers: their choice, and the batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from trainer.errors import ConfigError, DeviceError

_TRIALS: Final = (4, 8)
"""Images in the two trial batches."""

_MARGIN: Final = 0.9
"""Usable fraction of the memory; the rest is lost to fragmentation."""


def choose_devices(asked: Sequence[str], towers: int) -> tuple[torch.device, ...]:
    """Return the devices of the towers: one entry for all of them, or one for each.

    Args:
        asked: names given by the user; empty takes one GPU, or the CPU of a machine without. A machine with two gets a
            tower on each only by name, until that has run on two GPUs.
        towers: 1 or 2.

    Raises:
        ConfigError: a name that is no device, or neither one nor ``towers`` names.
        DeviceError: a device that this machine lacks.
    """
    found = torch.cuda.device_count()
    names = list(asked) or ["cuda:0" if found else "cpu"]
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError("--devices", ",".join(asked), "names such as cpu, cuda:0 or cuda:0,cuda:1") from None
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)  # "cuda" and "cuda:0" are the same device
            if (device.index or 0) >= found:
                raise DeviceError(name, f"torch sees {found} GPUs here; name another, or --devices cpu")
        elif device.type != "cpu":
            raise ConfigError("--devices", ",".join(asked), "names such as cpu, cuda:0 or cuda:0,cuda:1")
        devices.append(device)
    if len(devices) not in (1, towers):
        raise ConfigError("--devices", ",".join(asked), f"one device, or one for each of {towers} towers")
    return tuple(devices)


def choose_device(asked: Sequence[str]) -> torch.device:
    """Return one device for a whole network; raise as ``choose_devices`` does."""
    return choose_devices(asked, 1)[0]


def out_of_memory_error(
    batch: int, devices: Sequence[torch.device], trial: Callable[[int], None] | None
) -> DeviceError:
    """Return the error for a batch that was too large, naming one that would fit.

    Args:
        batch: images in the batch.
        devices: devices that computed it.
        trial: makes a step with a given number of images; None in a run of several processes, where one cannot step alone.
    """
    fits = min((batch_that_fits(device, trial, batch) for device in set(devices)), default=0) if trial else 0
    name = " and ".join(map(str, dict.fromkeys(devices)))
    advice = f"about {fits} images would fit: try --batch-size {fits}" if fits else "try a smaller --batch-size"
    return DeviceError(name, f"its memory is too small for a batch of {batch} images; {advice}, or more --devices")


def batch_that_fits(device: torch.device, trial: Callable[[int], None], asked: int) -> int:
    """Return how many images, fewer than ``asked``, fit into the memory of ``device``; 0 if unknown.

    Memory is a constant, for the network, plus a term proportional to the images, so two measurements determine it.
    """
    try:
        few, more = (peak_bytes(device, trial, images) for images in _TRIALS)
    except torch.cuda.OutOfMemoryError:
        return 0
    image_bytes = (more - few) / (_TRIALS[1] - _TRIALS[0])
    network_bytes = few - _TRIALS[0] * image_bytes
    if image_bytes <= 0:
        return 0
    fits = int((_MARGIN * available_bytes(device) - network_bytes) / image_bytes)
    # Multiples of 8 suit tensor cores. The batch that failed is never recommended, whatever the estimate says.
    return max(0, min(asked - 1, fits // 8 * 8 if fits >= 8 else fits))


def peak_bytes(device: torch.device, trial: Callable[[int], None], images: int) -> int:
    """Return the peak of torch's memory on ``device``, in bytes, during a step with ``images`` images."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    trial(images)
    return torch.cuda.max_memory_allocated(device)


def available_bytes(device: torch.device) -> int:
    """Return the bytes of ``device`` that torch can use: those it holds and those that are free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
