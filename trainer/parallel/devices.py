"""Which devices the towers live on, and how a batch gets there from host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import ConfigError, DeviceError

_STAGES: Final = 2
"""Pinned buffers in turn: one is filled while the other's copy to the device is under way."""

_TRIALS: Final = (4, 8)
"""Images in the two batches that are tried."""

_MARGIN: Final = 0.9
"""Share of the memory that is counted on: the rest is lost between blocks."""


def choose_devices(asked: Sequence[str], towers: int) -> tuple[torch.device, ...]:
    """The devices of the towers: one entry for all of them, or one for each.

    Args:
        asked: what the user named; empty means what the machine has (two GPUs, one, or the CPU).
        towers: 1 or 2.

    Raises:
        ConfigError: names that are no devices, or not one or ``towers`` of them.
        DeviceError: a device that this machine lacks.
    """
    found = torch.cuda.device_count()
    names = list(asked) or ([f"cuda:{i}" for i in range(min(towers, found))] if found else ["cpu"])
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError("--devices", ",".join(asked), "names such as cpu, cuda:0 or cuda:0,cuda:1") from None
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if (device.index or 0) >= found:
                raise DeviceError(name, f"torch sees {found} GPUs here; name another, or --devices cpu")
        elif device.type != "cpu":
            raise ConfigError("--devices", ",".join(asked), "names such as cpu, cuda:0 or cuda:0,cuda:1")
        devices.append(device)
    if len(devices) not in (1, towers):
        raise ConfigError("--devices", ",".join(asked), f"one device, or one for each of {towers} towers")
    return tuple(devices)


def choose_device(asked: Sequence[str]) -> torch.device:
    """One device for a whole network; raises like ``choose_devices``."""
    return choose_devices(asked, 1)[0]


class Stager:
    """Brings host arrays to the devices without stopping the computation there.

    On a GPU an array goes into pinned memory and from there, on a stream of its own, to the device, while the step
    before still computes. On the CPU nothing is copied: the tensor is the array.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._unique = tuple(dict.fromkeys(devices))
        self._devices = tuple(devices)
        self._streams = {
            d: torch.cuda.Stream(device=d)  # type: ignore[no-untyped-call]
            for d in self._unique
            if d.type == "cuda"
        }
        self._stages = [_Stage() for _ in range(_STAGES)]
        self._turn = 0

    def put(self, array: npt.NDArray[np.generic]) -> tuple[Tensor, ...]:
        """The array on each device.

        On the CPU the tensor is a view that keeps the array alive, not a copy; elsewhere the array may be reused at
        once.
        """
        if not self._streams:
            return (torch.from_numpy(array),) * len(self._devices)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        pinned = stage.fill(array)
        there = {device: self._send(pinned, device, stage) for device in self._unique}
        return tuple(there[device] for device in self._devices)

    def _send(self, pinned: Tensor, device: torch.device, stage: _Stage) -> Tensor:
        if device.type == "cpu":
            return pinned.clone()
        stream, compute = self._streams[device], torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            tensor = pinned.to(device, non_blocking=True)
            stage.sent.append(stream.record_event())
        compute.wait_stream(stream)
        tensor.record_stream(compute)  # else the allocator could give its memory away while compute still reads it
        return tensor


class _Stage:
    """One pinned buffer, refilled only when the copies out of it are done."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.sent: list[torch.cuda.Event] = []

    def fill(self, array: npt.NDArray[np.generic]) -> Tensor:
        for event in self.sent:
            event.synchronize()
        self.sent.clear()
        source = torch.from_numpy(array)
        if self._buffer.numel() < array.nbytes:
            self._buffer = torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._buffer[: array.nbytes].view(source.dtype).view(source.shape).copy_(source)


def out_of_memory_error(
    batch: int, devices: Sequence[torch.device], trial: Callable[[int], None] | None
) -> DeviceError:
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
    fits = int((_MARGIN * available_bytes(device) - fixed) / for_each)
    return max(0, min(asked - 1, fits // 8 * 8 if fits >= 8 else fits))


def peak_bytes(device: torch.device, trial: Callable[[int], None], images: int) -> int:
    """The most memory that torch has had in use on ``device`` during a step with ``images`` images."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    trial(images)
    return torch.cuda.max_memory_allocated(device)


def available_bytes(device: torch.device) -> int:
    """What torch may have of ``device``: what it has and what nobody has."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
