"""The time of a run by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from trainer.report import timing
from trainer.report.records import Log, RunRecord


def test_times_are_shares_of_the_run(record: RunRecord, words: Callable[[str], list[str]]) -> None:
    """Every phase has its share and its time for a step or an epoch; an old log without times has no such figure."""
    figure = timing.figure([record])
    assert figure is not None
    rows = figure.data["runs"]
    assert [row["phase"] for row in rows][:4] == ["waiting", "copy", "forward", "exchange"]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert next(row for row in rows if row["phase"] == "validating")["label"].endswith("an epoch")
    assert {row["label"] for row in rows} <= set(words(figure.svg()))
    assert timing.figure([replace(record, log=Log())]) is None


def test_several_runs_are_in_one_chart(record: RunRecord, words: Callable[[str], list[str]]) -> None:
    """Two runs have bars side by side, with their names in the legend."""
    figure = timing.figure([record, replace(record, name="other")])
    assert figure is not None
    assert {"small", "other"} <= set(words(figure.svg()))
