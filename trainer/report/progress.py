"""The progress of a report: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


class ReportProgress:
    """A display of the work on a report; use it as a context manager.

    Args:
        console: terminal or file to write to; not the one of the results.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> ReportProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Show what is done now."""
        if not self._console.is_terminal:
            self._console.print(f"report: {what}", markup=False, highlight=False, soft_wrap=True)
        self._bar.reset(self._task, description=what, total=None)

    def advance(self, done: int, images: int) -> None:
        """Show that ``done`` of ``images`` images are done."""
        self._bar.update(self._task, completed=done, total=images)
