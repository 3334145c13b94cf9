"""The learning rate schedules."""

from __future__ import annotations

import math

import msgspec
import pytest

from trainer.errors import ConfigError
from trainer.schedule import Schedule


def rates(errors: list[float], patience: int = 2) -> list[float]:
    schedule, out = Schedule(lr=0.01, patience=patience), []
    for epoch, error in enumerate(errors, start=1):
        schedule = schedule.after_epoch(error)
        out.append(round(schedule.rate(epoch, 90), 9))
    return out


def test_no_drop_while_the_error_falls() -> None:
    """Every improvement, however small, resets the patience."""
    assert rates([0.9, 0.8, 0.85, 0.79, 0.8, 0.78]) == [0.01] * 6


def test_a_drop_after_patience_epochs_without_improvement() -> None:
    """The rate drops after two epochs without improvement, and the patience restarts."""
    assert rates([0.5, 0.5, 0.6, 0.6, 0.6]) == [0.01, 0.01, 0.001, 0.001, 0.0001]


def test_at_most_three_drops() -> None:
    """The rate drops at most three times, as in the paper."""
    assert rates([0.5] * 20)[-1] == pytest.approx(1e-5)


def test_nan_is_no_improvement() -> None:
    """A NaN error counts as an epoch without improvement."""
    assert not Schedule(0.01).improves(math.nan)
    assert rates([0.5, math.nan, math.nan])[-1] == 0.001


def test_steps_drop_at_their_epochs() -> None:
    """The rate drops by ten at the start of each given epoch, independently of the error."""
    schedule = Schedule(0.01, "step", patience=1, drop_at=(3, 6))
    for error in (0.5, 0.6, 0.7):
        schedule = schedule.after_epoch(error)
    found = [schedule.rate(epoch, 90) for epoch in (0, 2.99, 3, 5.99, 6, 80)]
    assert found == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_cosine_falls_from_the_first_epoch_to_the_last() -> None:
    """The rate is full at the start, half in the middle, zero after the last step, and never rises."""
    schedule = Schedule(0.01, "cosine")
    assert [schedule.rate(epoch, 90) for epoch in (0, 45, 90)] == pytest.approx([0.01, 0.005, 0.0])
    found = [schedule.rate(epoch / 4, 90) for epoch in range(360)]
    assert found == sorted(found, reverse=True)
    assert min(found) > 0


def test_warm_up_rises_in_a_straight_line() -> None:
    """The rate rises linearly from a hundredth to its full value."""
    schedule = Schedule(0.01, warmup=2.0)
    assert [schedule.rate(epoch, 90) for epoch in (0, 1, 2, 50)] == pytest.approx([0.0001, 0.00505, 0.01, 0.01])


@pytest.mark.parametrize(
    "schedule",
    [Schedule(0.01, warmup=5.0), Schedule(0.01, "step", drop_at=(2,)), Schedule(0.01, "cosine")],
    ids=["warm-up", "step", "cosine"],
)
def test_by_hand_holds_at_once(schedule: Schedule) -> None:
    """With any policy, the rate is now the given one, and later falls in proportion."""
    changed, warm = schedule.by_hand(0.002, 3.0, 90), msgspec.structs.replace(schedule, warmup=0.0)
    assert changed.rate(3.0, 90) == pytest.approx(0.002)
    assert changed.rate(60, 90) / changed.rate(3, 90) == pytest.approx(warm.rate(60, 90) / warm.rate(3, 90))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"policy": "exponential"}, "--schedule=exponential cannot work: expected one of plateau, step, cosine."),
        ({"policy": "step"}, "expected --drop-at with step, and with step alone"),
        ({"drop_at": (3,)}, "expected --drop-at with step, and with step alone"),
        ({"policy": "step", "drop_at": (6, 3)}, "expected rising epochs from 1 on"),
        ({"policy": "step", "drop_at": (0, 3)}, "expected rising epochs from 1 on"),
        ({"warmup": -1.0}, "--warmup=-1.0 cannot work"),
    ],
)
def test_impossible_schedules_are_named(fields: dict[str, object], sentence: str) -> None:
    """The error names the option, its value and the possible values, in one sentence."""
    with pytest.raises(ConfigError) as caught:
        Schedule(0.01, **fields)
    assert sentence in str(caught.value)
