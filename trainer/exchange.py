"""Where the two towers meet: each reader gets the outputs of all towers, side by side (paper section 3.2, figure 2).

It happens before conv3 and before each fully connected layer, and nowhere else. There are several ways to run it; all
give the same numbers, forward and backward:

- ``OneDevice``: both towers on one device. The towers' outputs are put together once and shared.
- ``BetweenDevices``: two devices in one process. Each reader fetches what it lacks; autograd sends gradients back.
- ``BetweenProcesses``: one process for each tower, under ``torchrun``. Twins swap outputs, and gradients on the way back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.world import Pair

_PROBE_NUMBERS: Final = 1 << 20
"""Numbers in the test of a peer-to-peer copy: 4 MiB, more than one transfer's granule."""


class Exchange(Protocol):
    """One way for the towers to meet."""

    def __call__(self, parts: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """Give each reader the outputs of all towers.

        Args:
            parts: for each tower of this process (B, C, ...), on the tower's device.
            readers: the towers that need the result.

        Returns:
            For each reader in this process (B, towers * C, ...), on its device, in the order of the towers. A process
            with no reader gets a zero, (), whose backward pass fetches the gradients of what it gave.
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


class BetweenProcesses:
    """One process for each of two towers."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def __call__(self, parts: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """See ``Exchange``."""
        (mine,) = parts
        if len(readers) == 1 and self._pair.tower != readers[0]:
            given: Tensor = _Give.apply(_as_sent(mine), self._pair)  # type: ignore[no-untyped-call]
            return [given]
        way = _Swap if len(readers) == 2 else _Take
        theirs = _as_maps(way.apply(_as_sent(mine), self._pair))  # type: ignore[no-untyped-call]
        both = [mine, theirs] if self._pair.tower == 0 else [theirs, mine]
        return [torch.cat(both, dim=1)]


class _Ours(FunctionCtx):
    pair: Pair
    shape: torch.Size


class _Swap(torch.autograd.Function):
    """The twin's part for ours; back, our gradient of the twin's part for its gradient of ours."""

    @staticmethod
    def forward(ctx: _Ours, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        return pair.swap(mine.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: _Ours, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pair.swap(gradient.contiguous()), None


class _Take(torch.autograd.Function):
    """The twin's part; back, its gradient goes to the twin. Our own part only says what it looks like."""

    @staticmethod
    def forward(ctx: _Ours, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        return pair.receive(torch.empty_like(mine, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: _Ours, gradient: Tensor) -> tuple[None, None]:
        ctx.pair.send(gradient.contiguous())
        return None, None


class _Give(torch.autograd.Function):
    """Our part to the twin; back, its gradient comes from the twin."""

    @staticmethod
    def forward(ctx: _Ours, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair, ctx.shape = pair, mine.shape
        pair.send(mine.contiguous())
        return mine.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: _Ours, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pair.receive(gradient.new_empty(ctx.shape)), None


def _as_sent(part: Tensor) -> Tensor:
    """Maps (B, C, H, W) as (B, H, W, C), which is free for channels-last ones; units as they are."""
    return part.permute(0, 2, 3, 1) if part.dim() == 4 else part


def _as_maps(sent: Tensor) -> Tensor:
    """The inverse of ``_as_sent``."""
    return sent.permute(0, 3, 1, 2) if sent.dim() == 4 else sent


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
