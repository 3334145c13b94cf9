"""Progress on the console, for a terminal and for a file."""

from __future__ import annotations

import io

from rich.console import Console

from trainer.run.console import Reporter
from trainer.run.progress import EpochRecord, StepRecord

STEP = StepRecord(step=5, epoch=1, seen=150, loss=1.25, error=0.4, lr=0.01, images_per_s=1500.0, waiting=0.013)
EPOCH = EpochRecord(
    epoch=1, step=10, loss=1.2, error=0.39, val_loss=1.3, val_top1_error=0.45, val_top5_error=0.1, lr=0.01
)


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    with Reporter(console, epochs=4, epoch_size=300) as reporter:
        reporter.step(STEP)
        reporter.step(STEP)
        reporter.epoch(EPOCH)
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


def test_a_bar_on_a_terminal() -> None:
    """A terminal shows the same figures with a progress bar."""
    text = shown(terminal=True)
    assert "loss 1.250  error 40.0%  lr 0.01  1,500 images/s  MFU n/a  waiting 1.3%" in text
    assert "epoch 2/4" in text
    assert "━" in text
