"""The progress of a report."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.report.progress import ReportProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_told(terminal: bool) -> None:
    """A file gets a plain line for each step; a terminal gets a bar with the number of images."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with ReportProgress(console) as progress:
        progress.say("run [1]: images")
        progress.advance(3, 40)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "run [1]: images" in text
    if terminal:
        assert "3/40" in text
    else:
        assert text == "report: run [1]: images\n"
