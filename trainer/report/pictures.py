"""Sheets of pictures: guesses and nearest neighbours (figure 4 of the paper), and one picture as training gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trainer.data.samples import FedSample
from trainer.report.drawing import (
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    SKY,
    TIMES,
    WIDTH_PX,
    Figure,
    Pixels,
    drawing,
    places,
    tile,
)

GUESSED: Final = 8
"""Pictures with bars, as in figure 4 (left)."""

QUERIES: Final = 5
NEIGHBOURS: Final = 6
"""Rows and columns of figure 4 (right)."""

EPOCHS: Final = 6
"""Epochs of the picture as training gets it."""

_ACROSS: Final = 4
_GAP_PX: Final = 24
_BAR_PX: Final = 15
_ROW_PX: Final = 19
_LETTERS: Final = 22
"""Most letters of a class's name in a sheet."""

_CHECK: Final = "M-0.9,0.1L-0.3,0.7L0.9,-0.7"
"""A check mark as a path: few fonts have the letter."""

_DENSITY: Final = 2
"""Pixels of a picture per unit of the drawing."""


@dataclass(frozen=True)
class Guessed:
    """A validation picture and the network's best guesses: names and probabilities, 0 to 1, the best first."""

    record: int
    pixels: Pixels
    label: str
    guesses: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Neighbour:
    """A training picture, its class, and its distance from the picture that it is compared with."""

    record: int
    pixels: Pixels
    label: str
    distance: float


def guesses(pictures: Sequence[Guessed], about: str) -> Figure:
    """Return validation pictures with bars of their best guesses; ``about`` says how they were chosen."""
    pitch = (WIDTH_PX + _GAP_PX) / _ACROSS
    side = pitch - _GAP_PX
    most = max(len(picture.guesses) for picture in pictures)
    height = side + 30 + most * _ROW_PX + 22
    tiles, titles, bars, names, checks = [], [], [], [], []
    for number, picture in enumerate(pictures):
        left, top = number % _ACROSS * pitch, number // _ACROSS * height
        tiles.append({"x": left, "y": top, "url": tile(picture.pixels, round(_DENSITY * side))})
        titles.append({"x": left + side / 2, "y": top + side + 15, "text": _short(picture.label)})
        for row, (name, share) in enumerate(picture.guesses):
            y = top + side + 30 + row * _ROW_PX
            is_label = name == picture.label
            bars.append(
                {
                    "x": left,
                    "x2": left + max(1.5, side * share),
                    "y": y,
                    "y2": y + _BAR_PX,
                    "fill": ORANGE if is_label else SKY,
                }
            )
            names.append({"x": left + 5, "y": y + _BAR_PX / 2 + 0.5, "text": f"{_short(name)} {_percent(share)}"})
            if is_label:
                checks.append({"x": left + side - 9, "y": y + _BAR_PX / 2})
    rows = -(-len(pictures) // _ACROSS)
    all_right = sum(picture.guesses[0][0] == picture.label for picture in pictures)
    return Figure(
        name="guesses",
        title="Five best guesses",
        caption=f"Validation pictures with their true class below them, and bars of the network's {most} most probable classes. "
        "The bar of the true class is orange, with a check mark at its right, if it is among them. "
        f"{about}",
        alt=f"The best guess is right for {all_right} of {len(pictures)} pictures: "
        + "; ".join(f"{p.label}, taken for {p.guesses[0][0]} with {p.guesses[0][1]:.0%}" for p in pictures),
        spec=drawing(
            [
                places(tiles, "image", width=side, height=side, align="left", baseline="top"),
                places(titles, "text", align="center", baseline="middle", fontSize=14, fontWeight=600),
                places(bars, "rect", opacity=0.55),
                places(names, "text", align="left", baseline="middle", fontSize=12),
                *(
                    [places(checks, "point", shape=_CHECK, filled=False, size=90, strokeWidth=2, opacity=1)]
                    if checks
                    else ()
                ),
            ],
            WIDTH_PX,
            rows * height - 22,
        ),
        data=[
            {
                "record": p.record,
                "class": p.label,
                "guesses": [{"class": name, "probability": share} for name, share in p.guesses],
            }
            for p in pictures
        ],
    )


def neighbours(queries: Sequence[tuple[Guessed, Sequence[Neighbour]]], hidden: str, about: str) -> Figure:
    """Return validation pictures, each followed by the training pictures that are nearest to it.

    Args:
        queries: pictures and their neighbours, nearest first.
        hidden: name of the layer whose units are compared.
        about: sentence that says which training pictures were compared.
    """
    columns = max(len(near) for _, near in queries) + 1
    apart = 26  # between the first column and the others
    side = (WIDTH_PX - apart - 10 * (columns - 1)) / columns
    height = side + 42
    tiles, titles, words, frames = [], [], [], []
    for row, (query, near) in enumerate(queries):
        top = row * height
        tiles.append({"x": 0, "y": top, "url": tile(query.pixels, round(_DENSITY * side))})
        titles.append({"x": side / 2, "y": top + side + 13, "text": _short(query.label)})
        for column, each in enumerate(near):
            left = apart + (column + 1) * (side + 10)
            tiles.append({"x": left, "y": top, "url": tile(each.pixels, round(_DENSITY * side))})
            same = each.label == query.label
            words.append({"x": left + side / 2, "y": top + side + 13, "text": _short(each.label)})
            words.append({"x": left + side / 2, "y": top + side + 28, "text": f"{each.distance:.2f}"})
            if same:
                frames.append({"x": left, "x2": left + side, "y": top, "y2": top + side})
    all_same = sum(each.label == query.label for query, near in queries for each in near)
    total = sum(len(near) for _, near in queries)
    layers = [
        places(tiles, "image", width=side, height=side, align="left", baseline="top"),
        places(titles, "text", align="center", baseline="middle", fontSize=13, fontWeight=600),
        places(words, "text", align="center", baseline="middle", fontSize=12),
        places([{"x": side + 18, "x2": side + 18, "y": 0, "y2": len(queries) * height - 14}], "rule", color=GREY),
    ]
    if frames:
        layers.append(places(frames, "rect", filled=False, stroke=GREEN, strokeWidth=3))
    return Figure(
        name="neighbours",
        title="Nearest training pictures",
        caption=f"In the first column validation pictures; in the others the training pictures whose {hidden} outputs are nearest "
        f"by Euclidean distance, which stands below each. Those of the same class have a frame. {about}",
        alt=f"{all_same} of {total} nearest training pictures are of the same class: "
        + "; ".join(f"{query.label}: {', '.join(each.label for each in near)}" for query, near in queries),
        spec=drawing(layers, WIDTH_PX, len(queries) * height - 6),
        data=[
            {
                "record": query.record,
                "class": query.label,
                "nearest": [{"record": n.record, "class": n.label, "distance": n.distance} for n in near],
            }
            for query, near in queries
        ],
    )


def augmentation(whole: Pixels, fed: Sequence[FedSample], label: str, record: int) -> Figure:
    """Return a training picture, and the crops, flips and colour jitters of it that the first epochs get."""
    crop, side = len(fed[0].pixels), len(whole)
    left_side, heading, across = 300.0, 22.0, 3
    scale = left_side / side  # units of the drawing per pixel of the record
    pitch = (WIDTH_PX - left_side - 30 + 16) / across
    small = pitch - 16
    height = small + 62
    tiles, numbers, words, frames = [], [], [], []
    for number, sample in enumerate(fed):
        colour = SERIES[number % len(SERIES)]
        left, top = left_side + 30 + number % across * pitch, heading + number // across * height
        tiles.append({"x": left, "y": top, "url": tile(sample.pixels, round(_DENSITY * small))})
        numbers.append({"x": left, "y": top - 9, "text": f"epoch {sample.epoch + 1}"})
        place = f"from {sample.x}, {sample.y}{', mirrored' if sample.flip else ''}"
        jitter = "RGB " + ", ".join(f"{level:+d}" for level in sample.shift)
        words += [
            {"x": left, "y": top + small + 12 + 15 * row, "text": text} for row, text in enumerate((place, jitter))
        ]
        x, y = scale * sample.x, heading + scale * sample.y
        frames.append({"x": x, "x2": x + scale * crop, "y": y, "y2": y + scale * crop, "stroke": colour})
        frames.append({"x": left, "x2": left + small, "y": top, "y2": top + small, "stroke": colour})
    tall = max(heading + left_side, -(-len(fed) // across) * height + heading - 30)
    mirrored = sum(sample.flip for sample in fed)
    return Figure(
        name="augmentation",
        title="One picture as training gets it",
        caption=f"Left, training record {record} ({label}) as it is stored, with the frames of its crops in the first "
        f"{len(fed)} epochs, {crop}{TIMES}{crop} of {side}{TIMES}{side} pixels. Right, these "
        "crops in frames of the same colours, with the bytes that the network got: first column and row of the crop, flips, and "
        "the grey levels that the colour jitter added to red, green and blue.",
        alt=f"One picture ({label}) and {len(fed)} crops of it, {mirrored} of them mirrored, with small shifts of colour",
        spec=drawing(
            [
                places(
                    [{"x": 0, "y": heading, "url": tile(whole, round(_DENSITY * left_side))}],
                    "image",
                    width=left_side,
                    height=left_side,
                    align="left",
                    baseline="top",
                ),
                places(tiles, "image", width=small, height=small, align="left", baseline="top"),
                places(frames, "rect", filled=False, strokeWidth=2.5),
                places(
                    [{"x": 0, "y": 13, "text": f"record {record}: {_short(label)}"}, *numbers],
                    "text",
                    align="left",
                    baseline="middle",
                    fontSize=12,
                    fontWeight=600,
                ),
                places(words, "text", align="left", baseline="middle", fontSize=11),
            ],
            WIDTH_PX,
            tall,
        ),
        data={
            "record": record,
            "class": label,
            "samples": [{"epoch": s.epoch, "y": s.y, "x": s.x, "flip": s.flip, "shift": list(s.shift)} for s in fed],
        },
    )


def _percent(share: float) -> str:
    return "below 1%" if share < 0.005 else f"{share:.0%}"


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
