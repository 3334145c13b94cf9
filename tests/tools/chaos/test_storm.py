"""The storm of faults, with made-up faults against an arena without processes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, cast

import pytest

from tools.chaos import storm as module
from tools.chaos.arena import Arena
from tools.chaos.faults import Effect, Fault
from tools.chaos.storm import Storm
from tools.errors import ToolFailed


class Client:
    """A client that always trains."""

    name = "client"

    def batches(self) -> int:
        """Return a batch."""
        return 1


class EmptyArena:
    """An arena in which nothing happens."""

    clients = (Client(),)
    busy = False

    def check(self) -> None:
        """Find nothing."""

    def note_segments(self) -> None:
        """Note nothing."""


@pytest.fixture
def rage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Storm]:
    """Provide ``rage(count, name=begin, ...)``: a storm of these faults, without pauses, that has ended."""
    monkeypatch.setattr(module, "PACE_S", (0.0, 0.0))
    monkeypatch.setattr(module, "TICK_S", 0.0)
    monkeypatch.setattr(module, "FIRST_ROUND_S", 0.2)

    def run(count: int, **begin: Callable[..., Effect | None]) -> Storm:
        faults = {name: Fault(name, (0, 0), cast("Any", function)) for name, function in begin.items()}
        monkeypatch.setattr(module, "FAULTS", faults)
        storm = Storm(cast("Arena", EmptyArena()), Random(1), list(faults))
        storm.rage(0, count)
        return storm

    return run


def test_only_faults_that_were_seen_to_act_count(rage: Callable[..., Storm]) -> None:
    """A fault whose end reports no effect is counted apart, and the storm goes on until enough have acted."""
    ends: list[bool] = []

    def begin(*_: object) -> Effect:
        def end() -> bool:
            ends.append(len(ends) % 3 == 0)
            return ends[-1]

        return Effect(end)

    storm = rage(10, some=begin)
    assert storm.acted.total() == sum(ends) == 10
    assert storm.idle.total() == len(ends) - sum(ends) > 0


def test_a_kind_that_never_acts_is_named(rage: Callable[..., Storm]) -> None:
    """A kind of fault that is injected again and again without effect fails the run."""
    with pytest.raises(ToolFailed, match=r"idle: never seen to act; injected without effect: idle \d+ times"):
        rage(0, good=lambda *_: Effect(lambda: True), idle=lambda *_: Effect(lambda: False))


def test_a_kind_without_a_victim_is_named(rage: Callable[..., Storm]) -> None:
    """A kind of fault that finds no victim fails the run."""
    with pytest.raises(ToolFailed, match="lost: never seen to act; no victim was found"):
        rage(0, good=lambda *_: Effect(lambda: True), lost=lambda *_: None)
