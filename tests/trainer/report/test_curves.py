"""Learning curves: axes, marks of the learning rate, several runs, and the data behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.report import curves
from trainer.report.records import Log, RateByHand, RunRecord
from trainer.run.progress import EpochRecord, StepRecord

Words = Callable[[str], list[str]]

EPOCHS = [
    EpochRecord(0, 20, 1.9, 0.7, 2.1, 0.714, 0.25, 0.01),
    EpochRecord(1, 40, 1.7, 0.6, 1.9, 0.5, 0.125, 0.001),
]


def run(log: Log, name: str = "a & b") -> RunRecord:
    return RunRecord(Path(name), name, None, log, None, None, None, [])


def steps(rates: list[float]) -> list[StepRecord]:
    places = [(10 * (i + 1), i // 2, 50 * (i % 2 + 1)) for i in range(len(rates))]
    return [StepRecord(*place, 2.0, 0.7, lr, 9.0, 0.0) for place, lr in zip(places, rates, strict=True)]


def test_curves_have_both_splits_on_one_axis_and_the_changes_of_the_rate(words: Words) -> None:
    """Places are epochs, errors are in percent, and each change of the rate has a line with its value in both panels."""
    log = Log(steps=steps([0.01, 0.01, 0.001, 0.002]), epochs=EPOCHS, by_hand=[RateByHand(40, 0.002)])
    figure = curves.figure([run(log)])
    assert figure is not None
    shown = words(figure.svg())
    assert {"training", "validation", "validation, top-5", "epoch", "loss", "error", "60%"} <= set(shown)
    assert shown.count("rate 0.001") == shown.count("rate 0.002 by hand") == 2
    points = [(row["x"], row["value"]) for row in figure.data["curves"] if row["curve"] == "validation, top-5"]
    assert points == [(1, 0.25), (2, 0.125)]
    found = [(row["epoch"], row["lr"], row["by_hand"]) for row in figure.data["learning_rates"]["a & b"]]
    assert found == [(1.0, 0.001, False), (1.5, 0.002, True)]
    assert "the validation error goes from 71.4% to 50.0%" in figure.alt


def test_a_rate_that_changes_all_the_time_has_a_panel(words: Words) -> None:
    """Many changes are a curve of their own; without an ended epoch the axis has steps."""
    figure = curves.figure([run(Log(steps=steps([0.01 / (i + 1) for i in range(30)])))])
    assert figure is not None
    shown = words(figure.svg())
    assert {"Learning rate", "step"} <= set(shown)
    assert not any(word.startswith("rate 0") for word in shown)


def test_several_runs_share_the_axes(words: Words) -> None:
    """Each run has its name in the legend; a run without log lines is left out, and no figure is made of none."""
    both = [run(Log(steps=steps([0.1] * 4), epochs=EPOCHS), name) for name in ("first", "second")]
    figure = curves.figure([*both, run(Log(), "empty")])
    assert figure is not None
    assert {"first", "second"} <= set(words(figure.svg()))
    assert {row["run"] for row in figure.data["curves"]} == {"first", "second"}
    assert curves.figure([run(Log(), "empty")]) is None


def test_a_long_log_is_thinned() -> None:
    """A curve has at most MAX_POINTS points, whatever the log's length."""
    log = Log(steps=[StepRecord(i, 0, i, 1.0, 0.5, 0.1, 9.0, 0.0) for i in range(1, 10 * curves.MAX_POINTS)])
    figure = curves.figure([run(log)])
    assert figure is not None
    assert 0 < sum(row["metric"] == "loss" for row in figure.data["curves"]) <= curves.MAX_POINTS
