"""The confusion matrix: the share of each class's images that got each guess, with numbers where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trainer.report.drawing import BLUE, ORANGE, WIDTH_PX, Figure, spec_of

NUMBERED: Final = 25
"""Most classes whose cells have numbers."""

SHOWN: Final = 60
"""Most classes that have a row and a name each; of more, the matrix adds neighbouring classes up."""

_MISTAKES: Final = 15
_MATRIX_PX: Final = 620
_LARGEST_CELL_PX: Final = 52
_INK_CHANGES_AT: Final = 0.5
"""Share from which on a cell is so dark that its number is white."""


def figure(confusion: Sequence[Sequence[int]], names: Sequence[str], about: str) -> Figure:
    """Return the confusion matrix.

    Args:
        confusion: ``confusion[label][guess]``, numbers of images.
        names: names of the classes.
        about: sentence that says which images were classified.
    """
    counts = np.asarray(confusion, np.int64)  # (classes, classes)
    groups = _groups(len(names))
    labels = [_name(names, group) for group in groups]
    cells = _cells(_summed(counts, groups), labels)
    mistakes = _most_frequent(counts, names)
    right, images = int(np.trace(counts)), int(counts.sum())
    grouped = "" if len(groups) == len(names) else " Neighbouring classes are added up, because there are so many."
    numbers = "numbers are images; " if len(groups) <= NUMBERED else ""
    return Figure(
        name="confusion",
        title="Confusion matrix",
        caption=f"Rows are the true classes, columns the best guesses; {numbers}the darker, the larger the share of the class's "
        f"images. Right guesses are on the outlined diagonal.{grouped} {about}",
        alt=f"{right:,} of {images:,} images are right ({right / max(1, images):.1%}); most frequent mistakes: "
        + (", ".join(f"{m['label']} taken for {m['guess']} ({m['images']})" for m in mistakes[:5]) or "none"),
        spec=_chart(cells, labels, len(groups) <= NUMBERED),
        data={"classes": list(names), "confusion": counts.tolist(), "mistakes": mistakes},
        table=[
            ["true class", "best guess", "images"],
            *([m["label"], m["guess"], f"{m['images']:,}"] for m in mistakes),
        ]
        if mistakes
        else (),
    )


def _groups(classes: int) -> list[range]:
    """Return the classes of each row: one, or several if there are more than SHOWN."""
    size = -(-classes // SHOWN)
    return [range(first, min(classes, first + size)) for first in range(0, classes, size)]


def _name(names: Sequence[str], group: range) -> str:
    return names[group[0]] if len(group) == 1 else f"{names[group[0]]} ... {names[group[-1]]}"


def _summed(counts: npt.NDArray[np.int64], groups: Sequence[range]) -> npt.NDArray[np.int64]:
    starts = [group[0] for group in groups]
    return np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)


def _cells(counts: npt.NDArray[np.int64], labels: Sequence[str]) -> list[dict[str, Any]]:
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))  # rows sum to 1
    return [
        {
            "label": row,
            "guess": column,
            "images": int(counts[i, j]),
            "text": f"{counts[i, j]:,}" if counts[i, j] else "",
            "share": float(shares[i, j]),
            "dark": bool(shares[i, j] >= _INK_CHANGES_AT),
            "right": i == j,
        }
        for i, row in enumerate(labels)
        for j, column in enumerate(labels)
    ]


def _most_frequent(counts: npt.NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]
    pairs = [divmod(int(at), len(names)) for at in order]
    return [
        {"label": names[label], "guess": names[guess], "images": int(wrong[label, guess])}
        for label, guess in pairs
        if wrong[label, guess]
    ]


def _chart(cells: Sequence[dict[str, Any]], labels: Sequence[str], numbered: bool) -> dict[str, Any]:
    import altair as alt

    side = min(_LARGEST_CELL_PX, _MATRIX_PX / len(labels)) * len(labels)
    axis = {"ticks": False, "domain": False, "grid": False, "labelLimit": 180, "labelPadding": 6}
    if len(labels) > NUMBERED:
        axis["labelFontSize"] = max(7, int(side / len(labels)))
    x = alt.X(
        "guess:N",
        sort=list(labels),
        title="best guess",
        axis=alt.Axis(orient="top", labelAngle=-60, labelAlign="left", **axis),
    )
    y = alt.Y("label:N", sort=list(labels), title="true class", axis=alt.Axis(**axis))
    chart = alt.Chart(alt.Data(values=list(cells)))
    fill = alt.Color(
        "share:Q",
        title=["share of", "the class"],
        scale=alt.Scale(domain=[0, 1], range=["#f4f7fa", BLUE], interpolate="lab"),
        legend=alt.Legend(format="%", gradientLength=min(160, max(80, int(side))), orient="right"),
    )
    layers = [
        chart.mark_rect(stroke="#c9d1d9", strokeWidth=0.5).encode(x=x, y=y, color=fill),
        chart.transform_filter(alt.datum.right).mark_rect(fill=None, stroke=ORANGE, strokeWidth=1.5).encode(x=x, y=y),
    ]
    if numbered:
        ink = alt.condition(alt.datum.dark, alt.value("white"), alt.value("#1f2328"))
        size = max(9, min(14, int(side / len(labels) * 0.36)))
        layers.append(chart.mark_text(fontSize=size).encode(x=x, y=y, text="text:N", color=ink))
    return spec_of(alt.layer(*layers).properties(width=min(side, WIDTH_PX - 220), height=side))
