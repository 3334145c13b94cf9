"""Progress on stderr: a bar on a terminal, else one line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from loader_service.errors import printable

LINE_EVERY_S: Final = 5.0
"""Seconds between plain lines: rare enough for a log, frequent enough to show that the process is alive."""


class Progress:
    """A context manager that counts finished items, some of them bad, and shows the count and the rate.

    Args:
        what: name of the task, for example ``train``.
        total: number of items.
        unit: name of the items, in the plural.
        done: number of items that were finished before.
        bad: number of those that were bad.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, bad: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._bad, self._done_before = done, bad, done  # the rate is that of this run alone
        self._started_s = self._shown_s = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn(self._what, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,  # __exit__ prints a line in its place
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done, rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            self._line(final=True)

    def advance(self, count: int = 1, *, bad: int = 0) -> None:
        """Count finished items; ``bad`` is the number of those that could not be used."""
        self._done += count
        self._bad += bad
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._shown_s >= LINE_EVERY_S:
            self._line()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        text = printable(text)  # file names may contain anything
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)  # also [brackets]
        else:
            click.echo(text, err=True)

    def _rate(self) -> str:
        # A first call may come at once: no division by zero.
        per_s = (self._done - self._done_before) / max(time.monotonic() - self._started_s, 1e-3)
        return f"{per_s:,.0f} {self._unit}/s{f', {self._bad:,} bad' if self._bad else ''}"

    def _line(self, final: bool = False) -> None:
        self._shown_s = time.monotonic()
        elapsed_s = self._shown_s - self._started_s
        rate = (self._done - self._done_before) / max(elapsed_s, 1e-3)
        left = f", {(self._total - self._done) / rate:,.0f} s left" if rate and not final else f" in {elapsed_s:.1f} s"
        click.echo(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {self._rate()}{left}", err=True)
