"""The exchange between towers: equal numbers in every form, and copies that overlap, on pretended GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from trainer.model.alexnet import AlexNet
from trainer.model.rng import DropoutKey
from trainer.parallel import exchange
from trainer.parallel.exchange import (
    BetweenDevices,
    Exchange,
    OneDevice,
    Route,
    Share,
    Timed,
    choose_exchange,
    peer_copies_work,
)
from trainer.run.step_clock import Phase, StepClock

CPU = torch.device("cpu")
GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))

MAPS = torch.arange(48.0).view(2, 6, 2, 2)
LAST = MAPS.contiguous(memory_format=torch.channels_last)


def parts() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3).requires_grad_(), torch.arange(6.0, 12.0).view(2, 3).requires_grad_()]


@pytest.mark.parametrize("meet", [OneDevice(), BetweenDevices((CPU, CPU))], ids=["one", "two"])
def test_each_reader_gets_all_towers_in_order(meet: Exchange) -> None:
    """Each reader gets the towers' outputs side by side, in the order of the towers."""
    left, right = parts()
    wholes = list(meet([left, right], (0, 1)))
    assert len(wholes) == 2
    for whole in wholes:
        assert torch.equal(whole, torch.tensor([[0.0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]))
    assert len(list(meet([left, right], (0,)))) == 1


@pytest.mark.parametrize("meet", [OneDevice(), BetweenDevices((CPU, CPU))], ids=["one", "two"])
def test_gradients_of_all_readers_add_up(meet: Exchange) -> None:
    """Each tower's gradient is the sum of both readers' gradients."""
    left, right = parts()
    first, second = meet([left, right], (0, 1))
    (first.sum() + (second * torch.arange(6.0)).sum()).backward()
    assert torch.equal(left.grad, torch.tensor([[1.0, 2, 3]] * 2))
    assert torch.equal(right.grad, torch.tensor([[4.0, 5, 6]] * 2))


class Slow(torch.autograd.Function):
    """An operation that takes 4 seconds forward, and 8 backward, of a clock that the test sets."""

    now_s = 0.0

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor) -> Tensor:
        Slow.now_s += 4
        return part.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        Slow.now_s += 8
        return gradient


class SlowExchange:
    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        slow: list[Tensor] = [Slow.apply(part) for part in parts]
        yield from OneDevice()(slow, readers)


def test_a_timed_exchange_computes_the_same() -> None:
    """The clock takes the exchange's time alone, forward and backward, not that of the layers that it asks for."""
    Slow.now_s = 0.0
    clock = StepClock(CPU, lambda: Slow.now_s)

    def computed() -> Iterator[Tensor]:
        for part in parts():
            Slow.now_s += 1  # a layer
            yield part

    clock.switch(Phase.FORWARD)
    wholes = list(Timed(SlowExchange(), clock)(computed(), (0, 1)))
    plain = list(OneDevice()(parts(), (0, 1)))
    assert all(torch.equal(timed, other) for timed, other in zip(wholes, plain, strict=True))
    clock.switch(Phase.BACKWARD)
    loss = wholes[0].sum() + wholes[1].sum()
    loss.register_hook(lambda _: setattr(Slow, "now_s", Slow.now_s + 16))
    loss.backward()
    assert clock.read(0).seconds == {"forward": 2.0, "exchange": 24.0, "backward": 16.0}


def test_a_validation_is_not_divided() -> None:
    """Without gradients a timed exchange leaves the clock's phase as it is."""
    clock = StepClock(CPU)
    clock.switch(Phase.VALIDATING)
    with torch.no_grad():
        assert len(list(Timed(OneDevice(), clock)(parts(), (0, 1)))) == 2
    assert clock.switch(Phase.OTHER) is Phase.VALIDATING
    assert clock.read(0).seconds.keys() <= {"other", "validating"}


def test_the_form_follows_the_devices() -> None:
    """One device holds all towers; two hold one each, even if they are the same."""
    assert isinstance(choose_exchange((CPU,)), OneDevice)
    assert isinstance(choose_exchange((CPU, CPU)), BetweenDevices)


def test_damaged_peer_copies_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged copies give one warning, and the numbers stay right."""
    monkeypatch.setattr(exchange, "peer_copies_work", lambda devices: False)
    with pytest.warns(UserWarning, match="through host memory"):
        meet = BetweenDevices((CPU, CPU))
    left, right = parts()
    assert torch.equal(next(meet([left, right], (1,))), next(OneDevice()([left, right], (0,))))


def test_one_device_twice_needs_no_probe() -> None:
    """A device needs no copy to itself."""
    assert peer_copies_work((CPU, CPU))


@pytest.mark.parametrize("damage", [torch.zeros_like, lambda sent: sent.roll(1)], ids=["zeros", "garbage"])
def test_damaged_copies_are_noticed(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], Tensor]) -> None:
    """Copies that arrive as zeros or as other numbers are detected (here between two names of the CPU)."""
    devices = (CPU, torch.device("cpu", 0))
    assert peer_copies_work(devices)
    whole = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda sent, target: damage(whole(sent, target)))
    assert not peer_copies_work(devices)


class Stream:
    """A pretended stream that works when it is waited for, as late as possible; a computing stream has worked at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.work: list[Callable[[], object]] = []
        self.heard: set[Stream] = set()

    def wait_stream(self, other: Stream) -> None:
        self.heard.add(other)
        self.work.append(other.record_event())

    def record_event(self) -> Callable[[], object]:
        so_far = list(self.work)
        return lambda: [work() for work in so_far]

    def wait_event(self, event: Callable[[], object]) -> None:
        event()


class PretendedGpus:
    """Two GPUs whose tensors lie on the CPU. A copy is not a number until a stream that has it behind it is waited for.

    It stays so if the sending stream has not waited for the computing one since its last copy. ``log`` tells which copies
    were begun (``0>1``) and waited for (``0>1 used``); ``recorded``, whose memory is kept for which stream.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.recorded: set[tuple[int, Stream]] = set()
        self.computing = {device: Stream(device) for device in GPUS}
        self._current = dict(self.computing)
        self._in_host: list[Tensor] = []
        plain = Tensor.to
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", self._use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._current[device])
        monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: self.recorded.add((address(t), stream)))
        monkeypatch.setattr(
            Tensor,
            "to",
            lambda t, *to, **how: (
                plain(t, *to, **how) if self._current == self.computing else self._copy(t, *to, **how)
            ),
        )

    @contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        before, self._current[stream.device] = self._current[stream.device], stream
        yield
        self._current[stream.device] = before

    def _copy(self, tensor: Tensor, target: object, non_blocking: bool) -> Tensor:
        """Copy as torch does, on the current streams of both ends: between GPUs, to the host, or from it."""
        assert non_blocking
        assert tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        copy = torch.full_like(tensor, torch.nan)
        room = copy.detach()
        if target != "cpu" and not any(tensor is one for one in self._in_host):
            source = GPUS[1 - GPUS.index(target)]
            self._send(source, room, tensor)
            self._current[target].wait_stream(self._current[source])
            return copy
        if target == "cpu":
            (source,) = (device for device in GPUS if self.computing[device] in self._current[device].heard)
            self._send(source, room, tensor)
            self._in_host.append(copy)
        else:
            self._current[target].work.append(lambda: room.copy_(tensor))
        return copy

    def _send(self, source: torch.device, room: Tensor, tensor: Tensor) -> None:
        sending, name = self._current[source], f"{source.index}>{1 - source.index}"
        numbers = tensor.clone() if self.computing[source] in sending.heard else torch.full_like(tensor, torch.nan)
        sending.heard.clear()
        self.log.append(name)
        pending = [True]

        def arrive() -> None:
            if pending:
                pending.pop()
                room.copy_(numbers)
                self.log.append(f"{name} used")

        sending.work.append(arrive)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> PretendedGpus:
    return PretendedGpus(monkeypatch)


@pytest.fixture(params=[False, True], ids=["peers", "host"])
def meet(request: pytest.FixtureRequest, gpus: PretendedGpus, monkeypatch: pytest.MonkeyPatch) -> BetweenDevices:
    """Return an exchange between two GPUs, with intact peer-to-peer copies or through host memory."""
    monkeypatch.setattr(exchange, "peer_copies_work", lambda devices: not request.param)
    if request.param:
        with pytest.warns(UserWarning, match="through host memory"):
            return BetweenDevices(GPUS)
    return BetweenDevices(GPUS)


@pytest.mark.parametrize("through_host", [False, True], ids=["peers", "host"])
@pytest.mark.parametrize("given", [torch.arange(6.0), MAPS[:, :3], LAST[:, :3]], ids=["units", "maps", "channels-last"])
def test_a_copy_lands_when_it_is_waited_for(gpus: PretendedGpus, given: Tensor, through_host: bool) -> None:
    """A copy is filled when it is waited for; it is contiguous, keeps its format, and both ends' memory is kept."""
    transfer = Route(*GPUS, through_host).send(given)
    assert transfer.tensor.isnan().all()
    assert torch.equal(transfer.wait(), given)
    assert transfer.tensor.dim() == 1 or (transfer.tensor.stride(1) == 1) == (given.stride(1) == 1)
    streams = {
        end: {stream for what, stream in gpus.recorded if what == address(end)} for end in (given, transfer.tensor)
    }
    assert [stream.device for stream in streams[given] - set(gpus.computing.values())] == [GPUS[0]]
    assert gpus.computing[GPUS[1]] in streams[transfer.tensor]


def test_a_copy_is_waited_for_alone(gpus: PretendedGpus) -> None:
    """The user of the first copy does not wait for the second."""
    route = Route(*GPUS)
    first, second = route.send(torch.zeros(2)), route.send(torch.ones(2))
    first.wait()
    assert gpus.log == ["0>1", "0>1", "0>1 used"]
    assert torch.equal(second.wait(), torch.ones(2))


@pytest.mark.parametrize("ends", [(CPU, torch.device("cpu", 0)), (GPUS[0], CPU), (CPU, GPUS[0])], ids=str)
def test_with_a_cpu_at_an_end_the_copy_is_complete(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[torch.device, torch.device]
) -> None:
    """A copy to or from a CPU is synchronous, since no stream would delay the host's read."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(Tensor, "to", lambda tensor, *how: asked.append(how) or tensor.clone())
    assert torch.equal(Route(*ends).send(torch.arange(3.0)).tensor, torch.arange(3.0))
    assert asked == [(ends[1],)]


def towers(gpus: PretendedGpus) -> Iterator[Tensor]:
    """Yield the outputs of two towers, computed on demand."""
    for tower in range(2):
        gpus.log.append(f"tower {tower}")
        yield torch.arange(4.0).add(tower).view(2, 2).requires_grad_()


def test_copies_start_at_once_and_are_waited_for_late(gpus: PretendedGpus, meet: BetweenDevices) -> None:
    """A part is sent before the other tower computes, and a reader continues before the other one waits."""
    wholes = meet((part * 2 for part in meet(towers(gpus), (0, 1))), (0,))
    (whole,) = wholes
    assert gpus.log == ["tower 0", "0>1", "tower 1", "1>0", "1>0 used", "0>1 used", "1>0", "1>0 used"]
    assert not whole.isnan().any()


def test_gradients_cross_both_ways_at_once(gpus: PretendedGpus, meet: BetweenDevices) -> None:
    """Both gradients are sent before either tower waits."""
    first, second = meet(towers(gpus), (0, 1))
    gpus.log.clear()
    (first.sum() + second.sum()).backward()
    assert sorted(gpus.log[:2]) == ["0>1", "1>0"]
    assert sorted(gpus.log[2:]) == ["0>1 used", "1>0 used"]


def step(meet: Exchange | None) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and all gradients of a step."""
    share = Share((0, 1), meet) if meet else None
    model = AlexNet(3, width=0.05, seed=1, share=share, crop=84)
    pictures = torch.linspace(-100, 100, 4 * 3 * 84 * 84).view(4, 3, 84, 84).sin() * 100
    loss = functional.cross_entropy(model(pictures, DropoutKey(0, 0)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def test_a_step_on_two_gpus_is_that_on_one(gpus: PretendedGpus, meet: BetweenDevices) -> None:
    """Loss and gradients are equal bit for bit, with dropout; a missing wait would make them NaN."""
    (loss, gradients), (expected, others) = step(meet), step(None)
    assert gpus.log.count("0>1") == gpus.log.count("0>1 used") == 7  # three parts, and gradients of four
    assert torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
