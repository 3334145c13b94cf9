"""The time of a run by phase, on a host's clock and with events of a pretended GPU."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.run.step_clock import SAMPLED, Phase, StepClock


class Hand:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def hand() -> Hand:
    return Hand()


def spend(clock: StepClock, hand: Hand, phase: Phase, seconds: float) -> None:
    clock.switch(phase)
    hand.now_s += seconds


def test_every_second_belongs_to_one_phase(hand: Hand) -> None:
    """The times of a reading add up to the time since the reading before, and a phase without time is left out."""
    clock = StepClock(torch.device("cpu"), hand)
    hand.now_s = 0.5
    clock.begin_step()
    for phase, seconds in ((Phase.WAITING, 1.0), (Phase.FORWARD, 2.0), (Phase.UPDATE, 4.0)):
        spend(clock, hand, phase, seconds)
    clock.end_step()
    record = clock.read(7)
    assert (record.step, record.steps) == (7, 1)
    assert record.seconds == {"waiting": 1.0, "forward": 2.0, "update": 4.0, "other": 0.5}
    hand.now_s += 1.0
    assert clock.read(7).seconds == {"other": 1.0}


def test_a_phase_within_another_interrupts_it(hand: Hand) -> None:
    """The exchange within a forward pass is not counted twice, also if it fails."""
    clock = StepClock(torch.device("cpu"), hand)
    spend(clock, hand, Phase.FORWARD, 1.0)

    def fail() -> None:
        with clock.during(Phase.EXCHANGE):
            hand.now_s += 2.0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    hand.now_s += 4.0
    assert clock.read(0).seconds == {"forward": 5.0, "exchange": 2.0}


class Event:
    """An event of a pretended GPU, whose time is set by the test."""

    device_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at_ms = 0.0

    def record(self, _stream: object) -> None:
        self.at_ms = Event.device_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return later.at_ms - self.at_ms


def test_a_gpu_is_measured_by_events(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host only queues work: the device's phases of the sampled steps divide the time of all steps."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    clock = StepClock(torch.device("cuda:0"), hand)
    for step in range(2 * SAMPLED):
        clock.begin_step()
        clock.switch(Phase.FORWARD)
        Event.device_ms += 30 if step % SAMPLED == 0 else 1_000_000  # the others are not looked at
        clock.switch(Phase.BACKWARD)
        Event.device_ms += 60
        clock.end_step()
    hand.now_s += 9.0  # the host waits for the device here
    with clock.during(Phase.SAVING):
        hand.now_s += 5.0
    record = clock.read(16)
    assert record.steps == 16
    assert record.seconds == {"forward": 3.0, "backward": 6.0, "saving": 5.0}


def test_a_switch_costs_little() -> None:
    """A step of a hundredth of a second spends less than 1 % of it on its thirty switches."""
    clock = StepClock(torch.device("cpu"))
    times: list[float] = []
    for _ in range(5):
        began_s = time.perf_counter()
        for _ in range(30):
            clock.switch(Phase.FORWARD)
        times.append(time.perf_counter() - began_s)
    assert min(times) < 1e-4
