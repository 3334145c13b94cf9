"""Where the two towers meet: each reader gets the outputs of all towers, side by side (paper section 3.2, figure 2).

It happens before conv3 and before each fully connected layer, and nowhere else. There are several ways to run it; all
give the same numbers, forward and backward:

- ``OneDevice``: both towers on one device. The towers' outputs are put together once and shared.
- ``BetweenDevices``: two devices in one process. Each reader fetches what it lacks; autograd sends gradients back.

A process per tower (``torchrun``) is one more class of this shape: ``parts`` holds the one local tower's output, and the
rest comes from an all-gather.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Protocol

import torch
from torch import Tensor

_PROBE_NUMBERS: Final = 1 << 20
"""Numbers in the test of a peer-to-peer copy: 4 MiB, more than one transfer's granule."""


class Exchange(Protocol):
    """One way for the towers to meet."""

    def __call__(self, parts: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """Give each reader the outputs of all towers.

        Args:
            parts: for each tower (B, C, ...), on the tower's device.
            readers: the towers that need the result.

        Returns:
            For each reader (B, towers * C, ...), on its device, in the order of the towers.
        """


@dataclass(frozen=True)
class Share:
    """What a process has of a network that is spread over several.

    Fields:
        towers: the numbers of the towers that live here.
        exchange: how they meet the others.
    """

    towers: tuple[int, ...]
    exchange: Exchange


class OneDevice:
    """All towers on one device."""

    def __call__(self, parts: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """See ``Exchange``."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return [whole for _ in readers]


class BetweenDevices:
    """One device for each tower, in one process."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        self._through_host = not peer_copies_work(self._devices)
        if self._through_host:
            warnings.warn(
                f"copies between {' and '.join(map(str, devices))} arrive damaged on this machine: "
                "the towers meet through host memory instead, which is slower",
                stacklevel=2,
            )

    def __call__(self, parts: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """See ``Exchange``."""
        return [torch.cat([self._fetch(part, self._devices[reader]) for part in parts], dim=1) for reader in readers]

    def _fetch(self, part: Tensor, device: torch.device) -> Tensor:
        if self._through_host and part.device != device:
            part = part.cpu()
        return part.to(device, non_blocking=True)


def choose_exchange(devices: Sequence[torch.device]) -> Exchange:
    """The way to run towers that live on ``devices``: one entry puts all towers there, two give each its own."""
    return OneDevice() if len(devices) == 1 else BetweenDevices(devices)


def peer_copies_work(devices: Sequence[torch.device]) -> bool:
    """Whether tensors survive a copy between each two of ``devices``, both ways.

    On some machines the driver says that peers reach each other and then delivers zeros or garbage without an error
    (pytorch issues 13803, 84803, 87363).
    """
    for source, target in permutations(set(devices), 2):
        sent = torch.arange(_PROBE_NUMBERS, dtype=torch.int32, device=source)
        if not torch.equal(sent.to(target).cpu(), sent.cpu()):
            return False
    return True
