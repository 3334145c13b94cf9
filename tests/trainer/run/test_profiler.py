"""Profiles of training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.run.profiler import SKIPPED_STEPS, StepProfiler


def run(path: Path, asked: int, made: int) -> list[str]:
    """Make steps of one product each; return the lines for the user."""
    lines: list[str] = []
    with StepProfiler(path, asked, lines.append) as profiler:
        for _ in range(made):
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            profiler.step()
    return lines


@pytest.mark.parametrize(("made", "recorded"), [(20, 3), (5, 2)])
def test_the_asked_steps_are_in_the_trace(tmp_path: Path, made: int, recorded: int) -> None:
    """The trace has the steps after the first ones, fewer if the run ends; one line says what opens it."""
    path = tmp_path / "trace.json"
    (line,) = run(path, 3, made)
    assert str(path) in line
    assert "ui.perfetto.dev" in line
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == recorded


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    """Without a recorded step there is no file."""
    assert run(tmp_path / "trace.json", 3, SKIPPED_STEPS) == ["No profile: the run ended within 3 steps."]
    assert not list(tmp_path.iterdir())


def test_nothing_is_done_unasked(tmp_path: Path) -> None:
    """Without --profile there is neither a file nor a line."""
    assert run(tmp_path / "trace.json", 0, 5) == []
    assert not list(tmp_path.iterdir())
