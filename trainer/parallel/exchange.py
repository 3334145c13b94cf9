"""The exchange between the two towers: each reader gets the outputs of all towers (paper section 3.2, figure 2).

Towers exchange maps before conv3 and units before each fully connected layer, and nowhere else. There are three ways to
run it; all give the same numbers, forward and backward:

- ``OneDevice``: both towers on one device. The outputs are concatenated once and shared by all readers.
- ``BetweenDevices``: two devices in one process. Copies in both directions overlap with computation, as do the copies of
  gradients in the backward pass.
- ``BetweenProcesses``: one process for each tower, under ``torchrun``. The two processes swap outputs, and gradients in the
  backward pass.

A copy between GPUs has its own streams, one at each end. It waits for nothing that was queued after its tensor, and nothing
waits for it before the tensor is used::

    source, computing   ── tensor made ──●────────────────────────────────────────▶
    source, sending                      └─ wait ─ copy ─┐
    target, receiving                                    └─ arrived ─┐
    target, computing   ─────────────────────────────────────────────●─ tensor used ▶

Rules of the copies:

1. The sending stream waits for the computing stream, or it would copy a tensor that is not computed yet. The receiver's
   computing stream waits for that one copy, not for later ones, and only when the copy is about to be used.
2. The allocator ties memory to the stream that allocated it, and reuses it when the tensor is deleted even if other streams
   still read it. So a tensor is recorded on the second stream that uses it (pytorch issues 15568, 33909).
3. A received tensor is allocated on the receiving stream. On the computing stream it could get memory that queued work
   still reads, and the copy would have to wait for that work.
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
from trainer.run.step_clock import Phase, StepClock

_PROBE_NUMBERS: Final = 1 << 20
"""Numbers in the test of a peer-to-peer copy: 4 MiB of int32, so that the copy takes several chunks."""


class Exchange(Protocol):
    """One way to exchange outputs between towers."""

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """Give each reader the outputs of all towers.

        Both ends are lazy: a part is sent before the next one is requested, and a result is assembled when it is
        requested. If ``parts`` computes on demand, copies start early and are waited for late.

        Args:
            parts: for each tower of this process (B, C, ...), on the tower's device.
            readers: numbers of the towers that need the result.

        Yields:
            For each reader in this process (B, towers * C, ...), on its device, in the order of the towers. A process
            with no reader gets a zero, (), whose backward pass receives the gradients of its part.
        """


@dataclass(frozen=True)
class Share:
    """The part of a distributed network that one process has.

    Fields:
        towers: numbers of the towers in this process.
        exchange: exchange with the other towers.
    """

    towers: tuple[int, ...]
    exchange: Exchange


class OneDevice:
    """All towers on one device."""

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        given = list(parts)
        whole = given[0] if len(given) == 1 else torch.cat(given, dim=1)  # (B, towers * C, ...)
        for _ in readers:
            yield whole


class BetweenDevices:
    """One device for each tower, in one process.

    A copy overlaps with the other tower's part of the preceding segment, with the copy in the other direction, and with the
    drawing of dropout masks. In the backward pass it overlaps with the work that does not need that gradient.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        through_host = not peer_copies_work(self._devices)
        if through_host:
            warnings.warn(
                f"peer-to-peer copies between {' and '.join(map(str, devices))} are damaged on this machine: "
                "the towers exchange maps through host memory instead, which is slower",
                stacklevel=2,
            )
        self._routes = {(a, b): Route(a, b, through_host) for a, b in permutations(set(self._devices), 2)}

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        sent = [{reader: self._send(part, tower, reader) for reader in readers} for tower, part in enumerate(parts)]
        for reader in readers:
            yield torch.cat([copies[reader]() for copies in sent], dim=1)  # (B, towers * C, ...)

    def _send(self, part: Tensor, tower: int, reader: int) -> Callable[[], Tensor]:
        """Start to copy a part to a reader; return a function that waits for the copy, on the reader's stream, and returns it."""
        source, target = self._devices[tower], self._devices[reader]
        if source == target:
            return lambda: part
        # One autograd function for each end of the copy: the backward pass sends the gradient and waits for it apart, too.
        trip = _RoundTrip(self._routes[source, target], self._routes[target, source])
        started: Tensor = _StartCopy.apply(part, trip)  # type: ignore[no-untyped-call]
        return partial(_FinishCopy.apply, started, trip)


class Timed:
    """An exchange whose time a clock measures, forward and backward; it computes the same.

    The layers whose outputs it exchanges are computed on demand inside it, and count as ``forward``. On one device the backward
    pass of an exchange takes no time. With two devices in one process the copies of gradients overlap with the backward
    pass, and count as a part of it.
    """

    def __init__(self, exchange: Exchange, clock: StepClock) -> None:
        self._exchange, self._clock = exchange, clock
        self._waits_backward = not isinstance(exchange, OneDevice | BetweenDevices)

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """See ``Exchange``."""
        # A validation is one phase, and on a GPU most steps are not measured.
        if not (torch.is_grad_enabled() and self._clock.measures):
            yield from self._exchange(parts, readers)
            return
        inputs: list[Tensor] = []
        results = self._exchange(self._within(Phase.FORWARD, iter(parts), inputs), readers)
        before: Tensor | None = None
        for whole in self._within(Phase.EXCHANGE, results, []):
            if whole is not before and self._waits_backward:  # readers may share it
                self._time_backward(whole, inputs)
            yield whole
            before = whole

    def _within(self, phase: Phase, source: Iterator[Tensor], seen: list[Tensor]) -> Iterator[Tensor]:
        """Yield the tensors of ``source``, which computes each of them in ``phase``, and add them to ``seen``."""
        while True:
            before = self._clock.switch(phase)
            try:
                item = next(source, None)
            finally:
                self._clock.switch(before)
            if item is None:
                return
            seen.append(item)
            yield item

    def _time_backward(self, whole: Tensor, inputs: Sequence[Tensor]) -> None:
        """Time the backward pass of each operation between ``inputs`` and ``whole``."""
        found = {part.grad_fn for part in inputs} | {None}
        waiting = [whole.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in found:
                continue
            found.add(node)
            node.register_prehook(lambda *_: self._enter(Phase.EXCHANGE))
            node.register_hook(lambda *_: self._enter(Phase.BACKWARD))
            waiting += [before for before, _ in node.next_functions]

    def _enter(self, phase: Phase) -> None:
        self._clock.switch(phase)


class _RoundTrip:
    """The copy of a part to a reader on another device, and later the copy of its gradient back."""

    def __init__(self, there: Route, back: Route) -> None:
        self.there, self.back = there, back
        self._transfer: Transfer | None = None

    def start(self, transfer: Transfer) -> Tensor:
        """Keep a transfer that has just started; return its tensor, which is not filled yet."""
        self._transfer = transfer
        return transfer.tensor

    def finish(self) -> Tensor:
        """Wait for the transfer and return its tensor; drop the reference, since this object lives as long as the graph."""
        transfer, self._transfer = self._transfer, None
        assert transfer is not None, "no transfer was started"
        return transfer.wait()


class _TripContext(FunctionCtx):
    trip: _RoundTrip


class _StartCopy(torch.autograd.Function):
    """Starts the copy of a part and returns the part; its backward pass waits for the gradient.

    Autograd runs a node on the thread and stream of its output's device, and of the ready nodes the newest first. So the
    source's stream waits for the gradient after all its other work; and since every copy starts before the first one is
    waited for, no tower waits for a gradient before it has sent its own.
    """

    @staticmethod
    def forward(ctx: _TripContext, part: Tensor, trip: _RoundTrip) -> Tensor:
        ctx.trip = trip
        trip.start(trip.there.send(part))
        return part.view_as(part)  # a view: autograd must see an output other than the input

    @staticmethod
    @once_differentiable
    def backward(ctx: _TripContext, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.trip.finish()  # the same tensor as ``gradient``, filled from here on
        return gradient, None


class _FinishCopy(torch.autograd.Function):
    """Waits for the copy of a part on the reader's device; its backward pass starts the copy of the gradient.

    A backward pass normally returns complete gradients, since autograd may add others to them. This one goes to
    ``_StartCopy`` alone, which waits for it.
    """

    @staticmethod
    def forward(ctx: _TripContext, _started: Tensor, trip: _RoundTrip) -> Tensor:
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
        (mine,) = parts  # (B, C, H, W) maps or (B, C) units
        if len(readers) == 1 and self._pair.tower != readers[0]:
            yield _Send.apply(_as_sent(mine), self._pair)  # type: ignore[no-untyped-call]
            return
        operation = _Swap if len(readers) == 2 else _Receive
        theirs = _as_maps(operation.apply(_as_sent(mine), self._pair))  # type: ignore[no-untyped-call]
        both = [mine, theirs] if self._pair.tower == 0 else [theirs, mine]
        yield torch.cat(both, dim=1)


class _PairContext(FunctionCtx):
    pair: Pair
    shape: torch.Size


class _Swap(torch.autograd.Function):
    """Swaps parts with the peer; the backward pass swaps the gradients."""

    @staticmethod
    def forward(ctx: _PairContext, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair = pair
        return pair.swap(mine.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: _PairContext, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pair.swap(gradient.contiguous()), None


class _Receive(torch.autograd.Function):
    """Receives the peer's part, which has the shape of ours; the backward pass sends its gradient to the peer."""

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
    """Sends our part to the peer; the backward pass receives its gradient."""

    @staticmethod
    def forward(ctx: _PairContext, mine: Tensor, pair: Pair) -> Tensor:
        ctx.pair, ctx.shape = pair, mine.shape
        pair.send(mine.contiguous())
        return mine.new_zeros(())  # starts the backward pass of this process

    @staticmethod
    @once_differentiable
    def backward(ctx: _PairContext, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pair.receive(gradient.new_empty(ctx.shape)), None


def _as_sent(part: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as (B, H, W, C), without a copy if they are channels-last; return units (B, C) unchanged."""
    return part.permute(0, 2, 3, 1) if part.dim() == 4 else part


def _as_maps(sent: Tensor) -> Tensor:
    """Invert ``_as_sent``."""
    return sent.permute(0, 3, 1, 2) if sent.dim() == 4 else sent


def choose_exchange(devices: Sequence[torch.device]) -> Exchange:
    """Return the exchange for towers on ``devices``: one entry holds all towers, two hold one each."""
    return OneDevice() if len(devices) == 1 else BetweenDevices(devices)


def peer_copies_work(devices: Sequence[torch.device]) -> bool:
    """Return True if copies between all pairs of ``devices`` arrive intact, in both directions.

    On some machines the driver reports peer access and then delivers zeros or garbage without an error (pytorch issues
    13803, 84803, 87363).
    """
    for source, target in permutations(set(devices), 2):
        sent = torch.arange(_PROBE_NUMBERS, dtype=torch.int32, device=source)
        if not torch.equal(sent.to(target).cpu(), sent.cpu()):
            return False
    return True


@dataclass(frozen=True)
class Transfer:
    """A copy in flight.

    Fields:
        tensor: target of the copy, valid after ``wait``.
        target: device of ``tensor``.
        arrived: event at the end of the copy; None if it is complete.
    """

    tensor: Tensor
    target: torch.device
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Make the target's current stream wait for the copy, and return it; the host does not wait."""
        if self.arrived is not None:
            computing = torch.cuda.current_stream(self.target)
            computing.wait_event(self.arrived)
            self.tensor.record_stream(computing)  # rule 2
        return self.tensor


class Route:
    """Copies from one device to another.

    Args:
        source, target: devices of the tensors and of their copies.
        through_host: copy between GPUs through host memory instead of peer to peer.
    """

    def __init__(self, source: torch.device, target: torch.device, through_host: bool = False) -> None:
        self._source, self._target, self._through_host = source, target, through_host
        self._between_gpus = source.type == target.type == "cuda"
        if self._between_gpus:
            self._sending = torch.cuda.Stream(device=source)  # type: ignore[no-untyped-call]
            self._receiving = torch.cuda.Stream(device=target)  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> Transfer:
        """Start to copy a tensor that the source's current stream computes; shape, dtype and memory format stay.

        If either end is a CPU, the copy is complete when this returns.
        """
        if not self._between_gpus:
            return Transfer(tensor.to(self._target), self._target)
        self._sending.wait_stream(torch.cuda.current_stream(self._source))  # rule 1
        with torch.cuda.stream(self._sending), torch.cuda.stream(self._receiving):
            copy = self._copy(_packed(tensor))  # rule 3
            arrived = self._receiving.record_event()
        tensor.record_stream(self._sending)  # rule 2
        return Transfer(copy, self._target, arrived)

    def _copy(self, packed: Tensor) -> Tensor:
        """Copy on the two streams of this route, which are torch's current streams now."""
        if not self._through_host:
            return packed.to(self._target, non_blocking=True)  # torch makes the receiving stream wait
        in_host = packed.to("cpu", non_blocking=True)  # pinned; torch keeps it until both streams are done
        self._receiving.wait_stream(self._sending)
        return in_host.to(self._target, non_blocking=True)


def _packed(tensor: Tensor) -> Tensor:
    """Return the tensor in one contiguous block: a copy engine moves that, while a strided copy would need a kernel."""
    last = tensor.dim() == 4 and tensor.stride(1) == 1
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
