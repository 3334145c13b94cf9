"""When the learning rate drops."""

from __future__ import annotations

import math

import pytest

from trainer.schedule import Plateau


def rates(errors: list[float], patience: int = 2) -> list[float]:
    schedule, out = Plateau(lr=0.01, patience=patience), []
    for error in errors:
        schedule = schedule.after_epoch(error)
        out.append(round(schedule.lr, 9))
    return out


def test_no_drop_while_the_error_falls() -> None:
    """Every improvement, however small, starts the patience anew."""
    assert rates([0.9, 0.8, 0.85, 0.79, 0.8, 0.78]) == [0.01] * 6


def test_a_drop_after_patience_epochs_without_improvement() -> None:
    """The drop comes with the second stalled epoch, and then the patience starts anew."""
    assert rates([0.5, 0.5, 0.6, 0.6, 0.6]) == [0.01, 0.01, 0.001, 0.001, 0.0001]


def test_at_most_three_drops() -> None:
    """The paper's rate was reduced three times, whatever comes after."""
    assert rates([0.5] * 20)[-1] == pytest.approx(1e-5)


def test_nan_is_no_improvement() -> None:
    """An error that is no number counts as a stalled epoch."""
    assert not Plateau(0.01, 2).improves(math.nan)
    assert rates([0.5, math.nan, math.nan])[-1] == 0.001
