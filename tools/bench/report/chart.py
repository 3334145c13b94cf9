"""The figures of a run as a bar chart, ``docs/benchmarks.svg``; SVG is written directly, without a plotting library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

import msgspec

from tools.bench.contest import Kind

COLOURS: Final = {Kind.OURS: "#1a7f37", Kind.PEER: "#8c959f", Kind.LIMIT: "#d8dee4"}
LEGEND: Final = {Kind.OURS: "this project", Kind.PEER: "others", Kind.LIMIT: "limits of the machine"}

_NAMES_PX: Final = 290
_COLUMN_PX: Final = 210
_FIGURE_PX: Final = 62
"""Width of the figure at the right of a bar."""

_ROW_PX: Final = 22
_BAR_PX: Final = 14


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


def svg(panels: Mapping[str, Sequence[Row]], caption: str) -> str:
    """Return an SVG document.

    Args:
        panels: rows of each panel, in order, by the panel's heading.
        caption: place and date of the measurement.
    """
    parts, top = list[str](), 30
    for heading, rows in panels.items():
        parts.append(_panel(heading, rows, top))
        top += (len(rows) + 3) * _ROW_PX
    width = _NAMES_PX + len(COLUMNS) * _COLUMN_PX + 10
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + _ROW_PX}" '
            'font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            _legend(top),
            f'<text x="{width - 10}" y="{top}" text-anchor="end" fill="#57606a">{escape(caption)}</text>',
            "</svg>\n",
        ]
    )


def _panel(heading: str, rows: Sequence[Row], top: int) -> str:
    parts = [f'<text x="10" y="{top}" font-size="15" font-weight="bold">{escape(heading)}</text>']
    for number, (name, _, _) in enumerate(COLUMNS):
        parts.append(f'<text x="{_NAMES_PX + number * _COLUMN_PX}" y="{top}" fill="#57606a">{escape(name)}</text>')
    for index, row in enumerate(rows):
        y = top + 14 + index * _ROW_PX
        weight = ' font-weight="bold"' if row.kind is Kind.OURS else ""
        parts.append(f'<text x="{_NAMES_PX - 10}" y="{y + 11}" text-anchor="end"{weight}>{escape(row.title)}</text>')
        for number, (_, figure, form) in enumerate(COLUMNS):
            left, most = _NAMES_PX + number * _COLUMN_PX, max(figure(each) for each in rows) or 1.0
            length = max(1.0, (_COLUMN_PX - _FIGURE_PX) * figure(row) / most)
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{_BAR_PX}" fill="{COLOURS[row.kind]}"/>'
                f'<text x="{left + length + 4:.1f}" y="{y + 11}">{figure(row):{form}}</text>'
            )
    return "\n".join(parts)


def _legend(top: int) -> str:
    parts = list[str]()
    for number, (kind, name) in enumerate(LEGEND.items()):
        left = 10 + number * 110
        parts.append(f'<rect x="{left}" y="{top - 11}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{left + 16}" y="{top}">{escape(name)}</text>')
    return "\n".join(parts)
