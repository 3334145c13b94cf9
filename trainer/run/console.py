"""Progress of a run on the console: a live display on a terminal, plain lines elsewhere.

The live display has two lines below all that was printed, and fits into 80 columns::

    loss 1.069 ▇▆▅▅▄▃▃▂▂▂▁  error 38.0%  lr 0.01  159 img/s  MFU n/a  waiting 0.2%
    epoch 3/12 ━━━━━━━━━╺━━━━━━━━━ 42%   all ━━━━╸━━━━━━━━━━━━━━━ 20%   1:54 left
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Final

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.run.progress import EpochRecord, StepRecord

_PLAIN_EVERY_S: Final = 5.0
"""Minimum time between two plain lines of an epoch, so that a log file of fast steps stays readable."""

_REFRESH_PER_S: Final = 2
"""Redraws per second: the time left counts down, and nothing else moves between two log lines."""

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_CURVE_COLUMNS: Final = 40
"""Most columns of the curve of the loss."""

_TWO_BARS_COLUMNS: Final = 50
"""Width below which the bar of the epoch is left out, and that of the run stays."""


class Reporter:
    """A display of a run's progress; use it as a context manager.

    Args:
        console: terminal or file to write to.
        epochs: total number of epochs.
        epoch_size: positions in an epoch.
    """

    def __init__(self, console: Console, epochs: int, epoch_size: int) -> None:
        self._console, self._epochs, self._epoch_size = console, epochs, epoch_size
        self._display = _Display(epochs, epoch_size)
        self._live = Live(self._display, console=console, refresh_per_second=_REFRESH_PER_S, transient=True)
        self._printed_s = -_PLAIN_EVERY_S  # the first line is due at once

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:  # a file would fill with control codes
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a line."""
        # Paths may contain [brackets], and lines must not be wrapped for tools that read them.
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def step(self, record: StepRecord) -> None:
        """Show the figures of the newest steps."""
        if self._console.is_terminal:
            self._display.add(record)
            return
        if time.monotonic() - self._printed_s < _PLAIN_EVERY_S:
            return
        self._printed_s = time.monotonic()
        done, total = _positions(record, self._epochs, self._epoch_size)
        mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
        self.say(
            f"epoch {record.epoch + 1}/{self._epochs}  {done / total:.0%}  loss {record.loss:.3f}  error {record.error:.1%}  "
            f"lr {record.lr:g}  {record.images_per_s:,.0f} images/s  MFU {mfu}  waiting {record.waiting:.1%}  "
            f"{_duration(_left_s(record, done, total))} left"
        )

    def epoch(self, record: EpochRecord) -> None:
        """Show the results of an epoch."""
        average = "" if record.ema_val_top1_error is None else f"; averaged weights: {record.ema_val_top1_error:.1%}"
        self.say(
            f"epoch {record.epoch + 1}/{self._epochs} done: loss {record.loss:.3f}, error {record.error:.1%}; validation: "
            f"loss {record.val_loss:.3f}, top-1 error {record.val_top1_error:.1%}, top-5 {record.val_top5_error:.1%}"
            f"{average}"
        )


class _Display:
    """The live display's two lines; nothing before the first log line."""

    def __init__(self, epochs: int, epoch_size: int) -> None:
        self._epochs, self._epoch_size = epochs, epoch_size
        self._newest: StepRecord | None = None
        self._since_s = 0.0
        self._losses: list[float] = []

    def add(self, record: StepRecord) -> None:
        """Show a log line from now on."""
        self._losses.append(record.loss)
        self._newest, self._since_s = record, time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self._newest
        if record is None:
            yield Text("waiting for the first steps", style="dim")
            return
        width = options.max_width
        yield Group(self._figures(record, width), self._bars(record, width))

    def _figures(self, record: StepRecord, width: int) -> Text:
        """Return loss, its curve, and as many of the other figures as fit, in the order of their importance."""
        mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
        rate = f"{record.images_per_s:,.0f} img/s"
        figures = [
            f"waiting {record.waiting:.1%}",
            rate,
            f"error {record.error:.1%}",
            f"lr {record.lr:g}",
            f"MFU {mfu}",
        ]
        order = (2, 3, 1, 4, 0)  # as they are shown
        loss = f"loss {record.loss:.3f} "
        while figures and len(loss) + 8 + sum(len(each) + 2 for each in figures) > width:
            figures.pop()
        rest = "".join(f"  {figures[at]}" for at in order if at < len(figures))
        columns = max(0, min(_CURVE_COLUMNS, width - len(loss) - len(rest) - 1))
        line = Text(no_wrap=True, overflow="crop")
        line.append(loss, style="bold")
        line.append(sparkline(self._losses, columns), style="cyan")
        line.append(rest)
        return line

    def _bars(self, record: StepRecord, width: int) -> Table:
        """Return the progress of the epoch and of the run, and the time left, which keep their room on any terminal."""
        done, total = _positions(record, self._epochs, self._epoch_size)
        left_s = max(0.0, _left_s(record, done, total) - (time.monotonic() - self._since_s))
        line = Table.grid(padding=(0, 1), expand=True)
        both = width >= _TWO_BARS_COLUMNS
        parts: list[tuple[str, float]] = [
            (f"epoch {record.epoch + 1}/{self._epochs}", record.seen / self._epoch_size)
        ] * both
        cells: list[Text | ProgressBar] = []
        for name, share in [*parts, ("all", done / total)]:
            line.add_column(no_wrap=True)
            line.add_column(ratio=1)
            line.add_column(no_wrap=True, justify="right")
            cells += [Text(name), ProgressBar(total=1.0, completed=share), Text(f"{share:4.0%}")]
        line.add_column(no_wrap=True, justify="right")
        line.add_row(*cells, Text(f"{_duration(left_s)} left", style="bold"))
        return line


def sparkline(values: Sequence[float], columns: int) -> str:
    """Return a curve of values as one line of blocks, the lowest and the highest value at its ends.

    More values than columns are averaged in groups; one that is not finite leaves a gap.
    """
    if columns < 1 or not values:
        return ""
    columns = min(columns, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def _positions(record: StepRecord, epochs: int, epoch_size: int) -> tuple[int, int]:
    """Return the positions done, and those of the whole run."""
    return record.epoch * epoch_size + record.seen, epochs * epoch_size


def _left_s(record: StepRecord, done: int, total: int) -> float:
    return (total - done) / max(record.images_per_s, 1e-9)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
