"""Documents about the long runs: what was run, when, on which machine, and with what result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.bench.report.document import machine


def write(path: Path, title: str, says: str, command: str, lines: Iterable[str]) -> None:
    """Write a document.

    Args:
        path: its file; folders that are missing are made.
        title: its heading.
        says: a sentence or two about the run and its result.
        command: command that repeats the run and writes the document.
        lines: the rest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [
        f"# {title}",
        "",
        says,
        "",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
        f"- Machine: {machine()}",
        f"- Command: `{command}`, which also wrote this page",
        "",
    ]
    path.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; columns after the first are numbers, at the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
