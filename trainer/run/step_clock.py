"""The time of a run by phase: waiting for data, copying, computing, exchanging, updating, validating and saving.

One clock serves a process. The training loop and the exchange between towers tell it when a phase begins; a reading with each
log line returns the seconds of every phase since the reading before. On a CPU a switch of the phase reads the host's clock
(less than a microsecond). On a GPU the host only queues work, so there the steps are measured by events on the stream of the
first device. An event costs the host some microseconds, so a sample of the steps is measured and stands for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import pairwise
from typing import Final

import msgspec
import torch

SAMPLED: Final = 8
"""On a GPU one of so many steps is measured, and the first after each reading."""


class Phase(StrEnum):
    """Phases of a run, in the order of a step; the values stand in the log.

    ``waiting`` is the wait for a batch, and on a GPU also the part of its transfer that did not overlap with the step before.
    ``copy`` moves a batch from uint8 to floats minus the mean, on its device. ``exchange`` is between towers, and between
    replicas. ``other`` is the rest: log lines, counters, and the waits for other processes.
    """

    WAITING = "waiting"
    COPY = "copy"
    FORWARD = "forward"
    EXCHANGE = "exchange"
    BACKWARD = "backward"
    UPDATE = "update"
    VALIDATING = "validating"
    SAVING = "saving"
    OTHER = "other"


BETWEEN_STEPS: Final = frozenset({Phase.VALIDATING, Phase.SAVING})
"""Phases that end with a wait for the device, so that the host's clock measures them on any device."""


class TimeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="time", tag_field="event"):
    """A log line for the time since the previous one.

    Fields:
        step: updates of the weights so far.
        steps: updates since the previous line; 0 after a validation.
        seconds: seconds by the value of ``Phase``, without those of no time.
    """

    step: int
    steps: int
    seconds: dict[str, float]


class StepClock:
    """A clock that is always in one phase, first in ``other``.

    Args:
        device: device whose time counts; the first one of the process.
        now: monotonic clock of the host, in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._device = now, device
        self._by_events = device.type == "cuda"
        self._phase, self._since_s = Phase.OTHER, now()
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._steps = 0  # since the last reading
        self._sampled = False
        self._samples: list[
            list[tuple[Phase, torch.cuda.Event]]
        ] = []  # the beginnings of phases, for each sampled step

    @property
    def measures(self) -> bool:
        """True if the current step counts: on a CPU every step, on a GPU those of the sample."""
        return self._sampled or not self._by_events

    def begin_step(self) -> None:
        """Note that a step begins; the caller switches to its first phase."""
        self._sampled = self._by_events and self._steps % SAMPLED == 0
        if self._sampled:
            self._samples.append([])
        self._steps += 1

    def end_step(self) -> None:
        """Note that all work of the step is done, or queued on its device."""
        self.switch(Phase.OTHER)
        self._sampled = False

    def switch(self, phase: Phase) -> Phase:
        """Begin ``phase`` and return the one that ends."""
        before, now_s = self._phase, self._now()
        self._seconds[before] += now_s - self._since_s
        self._phase, self._since_s = phase, now_s
        if self._sampled:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._samples[-1].append((phase, event))
        return before

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` inside the block, then again in the phase before."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def read(self, step: int) -> TimeRecord:
        """Return the times since the last reading; on a GPU, waits until the sampled steps are done.

        Args:
            step: updates of the weights so far.
        """
        self.switch(self._phase)  # counts the current phase up to now
        seconds, steps = self._seconds, self._steps
        if self._by_events and self._samples:
            seconds = self._spread(seconds)
        self._seconds, self._steps, self._samples = dict.fromkeys(Phase, 0.0), 0, []
        return TimeRecord(step, steps, {phase.value: round(s, 6) for phase, s in seconds.items() if s > 0})

    def _spread(self, host: dict[Phase, float]) -> dict[Phase, float]:
        """Divide the host's time of all steps into phases as the device spent that of the sampled ones."""
        shares = dict.fromkeys(Phase, 0.0)
        for sample in self._samples:
            sample[-1][1].synchronize()
            for (phase, begin), (_, end) in pairwise(sample):
                shares[phase] += begin.elapsed_time(end)
        measured, total = sum(shares.values()), sum(s for phase, s in host.items() if phase not in BETWEEN_STEPS)
        if not measured:
            return host
        return {phase: host[phase] if phase in BETWEEN_STEPS else shares[phase] * total / measured for phase in Phase}
