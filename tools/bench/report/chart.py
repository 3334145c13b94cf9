"""The figures of a run as a bar chart, ``docs/benchmarks.svg``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from tools.bench.contest import Kind
from trainer.report.drawing import BLUE, drawing, places, render

COLOURS: Final = {Kind.OURS: BLUE, Kind.PEER: "#8c959f", Kind.LIMIT: "#c9d1d9"}
LEGEND: Final = {Kind.OURS: "this project", Kind.PEER: "others", Kind.LIMIT: "limits of the machine"}

_NAMES_PX: Final = 290
_COLUMN_PX: Final = 210
_FIGURE_PX: Final = 62
"""Width of the figure at the right of a bar."""

_ROW_PX: Final = 22
_BAR_PX: Final = 14

_QUIET: Final = "#57606a"
"""Colour of column headings and of the caption."""


class Row(msgspec.Struct, frozen=True):
    """A contestant's figures.

    Fields:
        title: name for people.
        kind: kind, which chooses the colour.
        images_per_s: median rate.
        cpu_s: median CPU seconds per 1,000 images.
        memory_mb: largest memory, 10**6 bytes.
    """

    title: str
    kind: Kind
    images_per_s: float
    cpu_s: float
    memory_mb: float


Mark = dict[str, Any]
Column = tuple[str, Callable[[Row], float], str]

COLUMNS: Final[tuple[Column, ...]] = (
    ("images/s", lambda row: row.images_per_s, ",.0f"),
    ("CPU s per 1,000 images", lambda row: row.cpu_s, ".3f"),
    ("memory, MB", lambda row: row.memory_mb, ",.0f"),
)
"""Heading, figure and format of each column. Higher is better in the first, lower in the others."""


def draw(panels: Mapping[str, Sequence[Row]], caption: str) -> str:
    """Return the chart as an SVG document.

    Args:
        panels: rows of each panel, in order, by the panel's heading.
        caption: place and date of the measurement.
    """
    headings, quiet, names, bars, figures = list[Mark](), list[Mark](), list[Mark](), list[Mark](), list[Mark]()
    top = 30
    for heading, rows in panels.items():
        headings.append({"x": 10, "y": top, "text": heading})
        quiet += [{"x": _NAMES_PX + n * _COLUMN_PX, "y": top, "text": name} for n, (name, _, _) in enumerate(COLUMNS)]
        for index, row in enumerate(rows):
            y = top + 14 + index * _ROW_PX
            names.append({"x": _NAMES_PX - 10, "y": y + _BAR_PX / 2, "text": row.title, "ours": row.kind is Kind.OURS})
            for n, column in enumerate(COLUMNS):
                bar, figure = _bar(row, rows, column, _NAMES_PX + n * _COLUMN_PX, y)
                bars.append(bar)
                figures.append(figure)
        top += (len(rows) + 3) * _ROW_PX  # the heading and two rows of space
    for number, (kind, name) in enumerate(LEGEND.items()):
        left = 10 + number * 150
        bars.append({"x": left, "x2": left + 12, "y": top - 11, "y2": top + 1, "fill": COLOURS[kind]})
        figures.append({"x": left + 16, "y": top - 5, "text": name})
    width = _NAMES_PX + len(COLUMNS) * _COLUMN_PX + 10
    ours, others = [row for row in names if row["ours"]], [row for row in names if not row["ours"]]
    layers = [
        places(headings, "text", align="left", fontSize=15, fontWeight="bold"),
        places(quiet, "text", align="left", color=_QUIET),
        places(others, "text", align="right", baseline="middle"),
        places(
            ours, "text", align="right", baseline="middle", fontWeight="bold"
        ),  # as the tables of docs/benchmarks.md
        places(bars, "rect"),
        places(figures, "text", align="left", baseline="middle"),
        places([{"x": width - 10, "y": top, "text": caption}], "text", align="right", color=_QUIET),
    ]
    return render(drawing(layers, width, top + _ROW_PX))


def _bar(row: Row, rows: Sequence[Row], column: Column, left: int, top: int) -> tuple[Mark, Mark]:
    """Return the bar of a row in a column, and its figure; each panel and column has its own scale."""
    _, figure, form = column
    most = max(figure(each) for each in rows) or 1.0  # the largest figure may be 0
    length = max(1.0, (_COLUMN_PX - _FIGURE_PX) * figure(row) / most)  # a bar of 0 would not be seen
    bar = {"x": left, "x2": left + length, "y": top, "y2": top + _BAR_PX, "fill": COLOURS[row.kind]}
    return bar, {"x": left + length + 4, "y": top + _BAR_PX / 2, "text": f"{figure(row):{form}}"}
