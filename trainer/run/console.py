"""Progress of a run on the console: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trainer.run.progress import EpochRecord, StepRecord

_PLAIN_EVERY_S: Final = 5.0
"""Minimum time between two plain lines of an epoch, so that a log file of fast steps stays readable."""


class Reporter:
    """A display of a run's progress; use it as a context manager.

    Args:
        console: terminal or file to write to.
        epochs: total number of epochs.
        epoch_size: positions in an epoch.
    """

    def __init__(self, console: Console, epochs: int, epoch_size: int) -> None:
        self._console, self._epochs, self._epoch_size = console, epochs, epoch_size
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._printed_s = -_PLAIN_EVERY_S  # the first line is due at once

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, sentence: str) -> None:
        """Print a line."""
        # Paths may contain [brackets], and lines must not be wrapped for tools that read them.
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def step(self, record: StepRecord) -> None:
        """Show the figures of the newest steps."""
        mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
        figures = (
            f"loss {record.loss:.3f}  error {record.error:.1%}  lr {record.lr:g}  "
            f"{record.images_per_s:,.0f} images/s  MFU {mfu}  waiting {record.waiting:.1%}"
        )
        done = record.epoch * self._epoch_size + record.seen
        total = self._epochs * self._epoch_size
        label = f"{record.epoch + 1}/{self._epochs}"
        if not self._console.is_terminal:  # a bar would fill a file with control codes
            if time.monotonic() - self._printed_s >= _PLAIN_EVERY_S:
                self._printed_s = time.monotonic()
                left_s = (total - done) / record.images_per_s
                self.say(f"epoch {label}  {done / total:.0%}  {figures}  {_duration(left_s)} left")
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=total, epoch=label, figures="")
        self._bar.update(self._task, completed=done, epoch=label, figures=figures)

    def epoch(self, record: EpochRecord) -> None:
        """Show the results of an epoch."""
        average = "" if record.ema_val_top1_error is None else f"; averaged weights: {record.ema_val_top1_error:.1%}"
        self.say(
            f"epoch {record.epoch + 1}/{self._epochs} done: loss {record.loss:.3f}, error {record.error:.1%}; validation: "
            f"loss {record.val_loss:.3f}, top-1 error {record.val_top1_error:.1%}, top-5 {record.val_top5_error:.1%}"
            f"{average}"
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
