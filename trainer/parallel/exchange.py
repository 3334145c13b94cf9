"""Where the two towers meet: each reader gets the outputs of all towers, side by side (paper section 3.2, figure 2).

It happens before conv3 and before each fully connected layer, and nowhere else. There are several ways to run it; all
give the same numbers, forward and backward:

- ``OneDevice``: both towers on one device. The towers' outputs are put together once and shared.
- ``BetweenDevices``: two devices in one process. Parts are copied beside the computation, both ways at once; so are
  their gradients on the way back.
- ``BetweenProcesses``: one process for each tower, under ``torchrun``. Twins swap outputs, and gradients on the way back.

Between GPUs a copy has streams of its own, one at each end: it waits for nothing that its devices were told to do after
the tensor was made, and holds none of it up::

    source, computing   ── tensor made ──●────────────────────────────────────────▶
    source, sending                      └─ wait ─ copy ─┐
    target, receiving                                    └─ arrived ─┐
    target, computing   ─────────────────────────────────────────────●─ tensor used ▶

Rules of the file:

1. The sending stream waits for the computing one, or it would copy what is not computed yet. The receiver's computing
   stream waits for that one copy, not for all that were sent since, and only when the copy is about to be used.
2. Memory belongs to the stream that it was allocated on, and is given away when the tensor is let go of, whatever other
   streams still do with it. So a tensor is recorded on the second stream that uses it (pytorch issues 15568, 33909).
3. What arrives is allocated on the receiving stream. On the computing one it could lie where queued work still reads, and
   the copy would have to wait for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.parallel.world import Pair

_PROBE_NUMBERS: Final = 1 << 20
"""Numbers in the test of a peer-to-peer copy: 4 MiB, more than one transfer's granule."""


class Exchange(Protocol):
    """One way for the towers to meet."""

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """Give each reader the outputs of all towers.

        Both ends may be lazy. A part is passed on before the next one is asked for, and a result is made when it is asked
        for: given ``parts`` that compute as they come, copies start early and are waited for late.

        Args:
            parts: for each tower of this process (B, C, ...), on the tower's device.
            readers: the towers that need the result.

        Yields:
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

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        given = list(parts)
        whole = given[0] if len(given) == 1 else torch.cat(given, dim=1)
        for _ in readers:
            yield whole


class BetweenDevices:
    """One device for each tower, in one process.

    The pieces that one tower can compute without the other end here, so what a copy overlaps with is the other tower's
    part of the piece before, the other way's copy, and the drawing of dropout masks; on the way back, whatever of a layer
    does not wait for that gradient.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        through_host = not peer_copies_work(self._devices)
        if through_host:
            warnings.warn(
                f"copies between {' and '.join(map(str, devices))} arrive damaged on this machine: "
                "the towers meet through host memory instead, which is slower",
                stacklevel=2,
            )
        self._routes = {(a, b): Route(a, b, through_host) for a, b in permutations(set(self._devices), 2)}

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        sent = [{reader: self._send(part, tower, reader) for reader in readers} for tower, part in enumerate(parts)]
        for reader in readers:
            yield torch.cat([on_its_way[reader]() for on_its_way in sent], dim=1)

    def _send(self, part: Tensor, tower: int, reader: int) -> Callable[[], Tensor]:
        """Begin to bring a part to a reader; returns what makes the reader's stream wait for it."""
        source, target = self._devices[tower], self._devices[reader]
        if source == target:
            return lambda: part
        trip = _RoundTrip(self._routes[source, target], self._routes[target, source])
        departed: Tensor = _StartCopy.apply(part, trip)  # type: ignore[no-untyped-call]
        return partial(_FinishCopy.apply, departed, trip)


class _RoundTrip:
    """A part's way to a reader on another device, and its gradient's way home."""

    def __init__(self, there: Route, back: Route) -> None:
        self.there, self.back = there, back
        self._transfer: Transfer | None = None

    def start(self, transfer: Transfer) -> Tensor:
        """Keep what has just been sent; returns its tensor, whose numbers are not there yet."""
        self._transfer = transfer
        return transfer.tensor

    def finish(self) -> Tensor:
        """Wait for what was put, and let go of it: the trip lives as long as its graph."""
        transfer, self._transfer = self._transfer, None
        assert transfer is not None, "nothing was sent"
        return transfer.wait()


class _TripContext(FunctionCtx):
    trip: _RoundTrip


class _StartCopy(torch.autograd.Function):
    """The part itself, whose copy sets out. Back, its gradient lands.

    Autograd runs a node on the thread and stream of the device where its output lies, what is ready and was made last
    first. So it is the source's stream that waits for the gradient, after all else that there was to do; and since parts
    depart before any arrives, no tower waits for a gradient before it has sent its own.
    """

    @staticmethod
    def forward(ctx: _TripContext, part: Tensor, trip: _RoundTrip) -> Tensor:
        ctx.trip = trip
        trip.start(trip.there.send(part))
        return part.view_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: _TripContext, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.trip.finish()  # it is the gradient
        return gradient, None


class _FinishCopy(torch.autograd.Function):
    """The part's copy on the reader's device, landed. Back, its gradient sets out.

    A gradient should be complete when a node hands it on, since autograd might add others to it. Only ``_StartCopy`` gets
    this one, and waits for it.
    """

    @staticmethod
    def forward(ctx: _TripContext, _departed: Tensor, trip: _RoundTrip) -> Tensor:
        ctx.trip = trip
        return trip.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: _TripContext, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.start(ctx.trip.back.send(gradient)), None


class BetweenProcesses:
    """One process for each of two towers."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        (mine,) = parts
        if len(readers) == 1 and self._pair.tower != readers[0]:
            yield _Send.apply(_as_sent(mine), self._pair)  # type: ignore[no-untyped-call]
            return
        way = _Swap if len(readers) == 2 else _Receive
        theirs = _as_maps(way.apply(_as_sent(mine), self._pair))  # type: ignore[no-untyped-call]
        both = [mine, theirs] if self._pair.tower == 0 else [theirs, mine]
        yield torch.cat(both, dim=1)


class _PairContext(FunctionCtx):
    pair: Pair
    shape: torch.Size


class _Swap(torch.autograd.Function):
    """The twin's part for ours; back, our gradient of the twin's part for its gradient of ours."""

    @staticmethod
    def forward(ctx: _PairContext, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        return pair.swap(mine.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: _PairContext, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pair.swap(gradient.contiguous()), None


class _Receive(torch.autograd.Function):
    """The twin's part; back, its gradient goes to the twin. Our own part only says what it looks like."""

    @staticmethod
    def forward(ctx: _PairContext, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        return pair.receive(torch.empty_like(mine, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: _PairContext, gradient: Tensor) -> tuple[None, None]:
        ctx.pair.send(gradient.contiguous())
        return None, None


class _Send(torch.autograd.Function):
    """Our part to the twin; back, its gradient comes from the twin."""

    @staticmethod
    def forward(ctx: _PairContext, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair, ctx.shape = pair, mine.shape
        pair.send(mine.contiguous())
        return mine.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: _PairContext, gradient: Tensor) -> tuple[Tensor, None]:
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


@dataclass(frozen=True)
class Transfer:
    """A tensor on its way.

    Fields:
        tensor: the copy, whose numbers count after ``land``.
        target: the device that it lies on.
        arrived: when the numbers are there; None if they are already.
    """

    tensor: Tensor
    target: torch.device
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The copy, for the target's current stream to use: that stream waits, the caller does not."""
        if self.arrived is not None:
            computing = torch.cuda.current_stream(self.target)
            computing.wait_event(self.arrived)
            self.tensor.record_stream(computing)
        return self.tensor


class Route:
    """The way from one device to another.

    Args:
        source, target: where tensors come from, and where their copies go.
        through_host: whether copies between GPUs go through host memory instead of from peer to peer.
    """

    def __init__(self, source: torch.device, target: torch.device, through_host: bool = False) -> None:
        self._source, self._target, self._through_host = source, target, through_host
        self._between_gpus = source.type == target.type == "cuda"
        if self._between_gpus:
            self._sending = torch.cuda.Stream(device=source)  # type: ignore[no-untyped-call]
            self._receiving = torch.cuda.Stream(device=target)  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> Transfer:
        """Begin to copy a tensor that the source's current stream computes; of its shape, dtype and order of channels.

        With a CPU at either end the copy is complete when this returns.
        """
        if not self._between_gpus:
            return Transfer(tensor.to(self._target), self._target)
        self._sending.wait_stream(torch.cuda.current_stream(self._source))
        with torch.cuda.stream(self._sending), torch.cuda.stream(self._receiving):
            copy = self._copy(_packed(tensor))
            arrived = self._receiving.record_event()
        tensor.record_stream(self._sending)
        return Transfer(copy, self._target, arrived)

    def _copy(self, packed: Tensor) -> Tensor:
        """Copy on the two streams of this route, which are torch's current ones."""
        if not self._through_host:
            return packed.to(self._target, non_blocking=True)  # torch has the receiving stream wait for the sending one
        in_host = packed.to("cpu", non_blocking=True)  # pinned, and kept by torch until both streams have done with it
        self._receiving.wait_stream(self._sending)
        return in_host.to(self._target, non_blocking=True)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor in one piece, which an engine for copies moves by itself; kernels would take units from computation."""
    last = tensor.dim() == 4 and tensor.stride(1) == 1
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
