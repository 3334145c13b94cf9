"""The figures of a run as a bar chart, ``docs/benchmarks.svg``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from tools.bench.contest import Kind
from trainer.run import svg

COLOURS: Final = {Kind.OURS: "#1a7f37", Kind.PEER: "#8c959f", Kind.LIMIT: "#d8dee4"}
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


COLUMNS: Final[tuple[tuple[str, Callable[[Row], float], str], ...]] = (
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
    parts, top = list[str](), 30
    for heading, rows in panels.items():
        parts += _panel(heading, rows, top)
        top += (len(rows) + 3) * _ROW_PX  # the heading and two rows of space
    width = _NAMES_PX + len(COLUMNS) * _COLUMN_PX + 10
    parts += [*_legend(top), svg.text(width - 10, top, caption, text_anchor="end", fill=_QUIET)]
    return svg.document(width, top + _ROW_PX, parts)


def _panel(heading: str, rows: Sequence[Row], top: int) -> list[str]:
    parts = [svg.text(10, top, heading, font_size=15, font_weight="bold")]
    for number, (name, _, _) in enumerate(COLUMNS):
        parts.append(svg.text(_NAMES_PX + number * _COLUMN_PX, top, name, fill=_QUIET))
    for index, row in enumerate(rows):
        y = top + 14 + index * _ROW_PX
        weight = "bold" if row.kind is Kind.OURS else "normal"  # as the tables of docs/benchmarks.md
        # SVG places text by its baseline: 11 px below the top of a bar of 14.
        parts.append(svg.text(_NAMES_PX - 10, y + 11, row.title, text_anchor="end", font_weight=weight))
        for number, (_, figure, form) in enumerate(COLUMNS):
            # Each panel and column has its own scale. `or`: the largest figure may be 0.
            left, most = _NAMES_PX + number * _COLUMN_PX, max(figure(each) for each in rows) or 1.0
            length = max(1.0, (_COLUMN_PX - _FIGURE_PX) * figure(row) / most)  # a bar of 0 would not be seen
            parts.append(svg.rect(left, y, length, _BAR_PX, fill=COLOURS[row.kind]))
            parts.append(svg.text(left + length + 4, y + 11, f"{figure(row):{form}}"))
    return parts


def _legend(top: int) -> list[str]:
    parts = list[str]()
    for number, (kind, name) in enumerate(LEGEND.items()):
        left = 10 + number * 110
        parts += [svg.rect(left, top - 11, 12, 12, fill=COLOURS[kind]), svg.text(left + 16, top, name)]
    return parts
