"""Devices of the towers: their choice, the transfer of batches from host memory, and the batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import ConfigError, DeviceError

_STAGES: Final = 2
"""Number of pinned buffers: one is filled while the other is copied to the device."""

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


class Stager:
    """Copies of host arrays on the devices, made while the devices compute.

    For a GPU, an array is copied to pinned memory and from there to the device on a separate stream, while the previous
    step still computes. On the CPU nothing is copied: the tensor shares the array's memory.

    Args:
        devices: targets, one for each tower; a device that occurs twice gets one copy.
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
        """Return the array as a tensor on each device, of the same shape and dtype.

        On the CPU the tensor is a view that keeps the array alive. For GPUs the array may be reused at once.
        """
        if not self._streams:
            return (torch.from_numpy(array),) * len(self._devices)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        pinned = stage.fill(array)
        sent = {device: self._send(pinned, device, stage) for device in self._unique}
        return tuple(sent[device] for device in self._devices)

    def _send(self, pinned: Tensor, device: torch.device, stage: _Stage) -> Tensor:
        if device.type == "cpu":
            return pinned.clone()  # the buffer is filled again two batches later
        stream, compute = self._streams[device], torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            tensor = pinned.to(device, non_blocking=True)
            stage.sent.append(stream.record_event())
        compute.wait_stream(stream)  # the host does not wait
        # The allocator knows only the stream that allocated; without this it could reuse memory that compute still reads.
        tensor.record_stream(compute)
        return tensor


class _Stage:
    """A pinned buffer that is refilled only when the copies from it are complete."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.sent: list[torch.cuda.Event] = []

    def fill(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Copy ``array`` into the buffer and return it as a tensor of the array's shape and dtype."""
        for event in self.sent:
            event.synchronize()
        self.sent.clear()
        source = torch.from_numpy(array)
        if self._buffer.numel() < array.nbytes:  # pinning is slow, so buffers only grow
            self._buffer = torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._buffer[: array.nbytes].view(source.dtype).view(source.shape).copy_(source)


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
