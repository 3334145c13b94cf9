"""Progress on the console, for a terminal and for a file."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from trainer.run.console import Reporter, sparkline
from trainer.run.progress import EpochRecord, StepRecord

STEP = StepRecord(step=5, epoch=1, seen=150, loss=1.25, error=0.4, lr=0.01, images_per_s=1500.0, waiting=0.013)
EPOCH = EpochRecord(
    epoch=1, step=10, loss=1.2, error=0.39, val_loss=1.3, val_top1_error=0.45, val_top5_error=0.1, lr=0.01
)


def shown(terminal: bool, width: int = 200) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with Reporter(console, epochs=4, epoch_size=300) as reporter:
        reporter.step(STEP)
        reporter.step(STEP)
        reporter.epoch(EPOCH)  # a printed line redraws the live display below it
        reporter.say("a [line] of its own")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_in_a_file() -> None:
    """A file gets one line for steps in quick succession and one for the epoch; markup is not interpreted."""
    assert shown(terminal=False).splitlines() == [
        "epoch 2/4  38%  loss 1.250  error 40.0%  lr 0.01  1,500 images/s  MFU n/a  waiting 1.3%  0:00 left",
        "epoch 2/4 done: loss 1.200, error 39.0%; validation: loss 1.300, top-1 error 45.0%, top-5 10.0%",
        "a [line] of its own",
    ]


def lines(text: str) -> list[str]:
    """The printed lines, without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


def test_a_live_display_on_a_terminal() -> None:
    """A terminal shows the same figures with the loss as a curve, and bars for the epoch and the run."""
    text = shown(terminal=True)
    figures = next(line for line in lines(text) if line.startswith("loss"))
    assert figures.split() == [
        "loss",
        "1.250",
        "▁▁",
        "error",
        "40.0%",
        "lr",
        "0.01",
        "1,500",
        "img/s",
        "MFU",
        "n/a",
        "waiting",
        "1.3%",
    ]
    bars = next(line for line in lines(text) if line.startswith("epoch 2/4 ━"))
    assert re.fullmatch(r"epoch 2/4 ━.* 50% all ━.* 38% 0:0\d left", bars)
    assert "epoch 2/4 done: loss 1.200" in text
    assert "a [line] of its own" in text


@pytest.mark.parametrize("width", [80, 60, 40])
def test_bars_and_the_time_left_survive_narrow_terminals(width: int) -> None:
    """No line is wider than the terminal; figures give way first, the bar of the run and the time left never do."""
    printed = lines(shown(terminal=True, width=width))
    live = [line for line in printed if line.startswith(("loss", "epoch 2/4 ━", "all"))]
    assert live
    assert max(map(len, live)) <= width
    assert any(re.search(r"all ━+\S* .*left$", line) for line in live)
    assert all("waiting 1.3%" in line for line in live if line.startswith("loss"))


def test_a_sparkline_has_its_ends_at_the_lowest_and_highest_value() -> None:
    """Values become blocks; more values than columns are averaged, a number that is not finite is a gap."""
    assert sparkline([0.0, 7.0, 3.0], 10) == "▁█▄"
    assert sparkline([8.0, 8.0, 1.0, 1.0], 2) == "█▁"
    assert sparkline([1.0, float("nan"), 2.0], 3) == "▁ █"
    assert sparkline([5.0, 5.0], 5) == "▁▁"
    assert sparkline([], 5) == sparkline([1.0], 0) == ""
