"""The kernels of the first layer, tower above tower (figure 3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from trainer.report.drawing import WIDTH_PX, Figure, Pixels, drawing, places, tile

PER_ROW: Final = 16  # as in figure 3
_GAP_PX: Final = 4
_LARGEST_SCALE: Final = 7
"""Most pixels per weight; a row of fewer kernels is drawn larger, up to that."""

_LEFT_PX: Final = 36  # of the numbers of the first kernels
_HEADING_PX: Final = 26
_FONT_PX: Final = 15
_GREY_LEVEL: Final = 127.5
_INK: Final = (31, 35, 40)

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Block:
    """The kernels of one tower as a picture, without words.

    Fields:
        heading: words above it.
        first: number of the tower's first kernel, from 1.
        count: number of its kernels.
        pitch: pixels from one kernel to the next.
        per_row: kernels in a row.
        pixels: (height, width, 4) uint8, R, G, B and alpha; transparent between the kernels.
    """

    heading: str
    first: int
    count: int
    pitch: int
    per_row: int
    pixels: Pixels

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The number of the first kernel of each row, and the middle of the row in pixels."""
        firsts = range(0, self.count, self.per_row)
        return [(self.first + at, row * self.pitch + self.pitch // 2) for row, at in enumerate(firsts)]


def figure(towers: Sequence[Weights], activation: str = "") -> Figure:
    """Return the kernels of the first layer; ``towers`` has (K, 3, 11, 11) for each tower."""
    blocks = _blocks(towers)
    words: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []
    pictures: list[Any] = []
    top = 0
    for block in blocks:
        words.append({"x": _LEFT_PX + _GAP_PX, "y": top + 16, "text": block.heading})
        top += _HEADING_PX
        height, width = block.pixels.shape[:2]
        numbers += [{"x": _LEFT_PX - 2, "y": top + y, "text": str(first)} for first, y in block.rows]
        row = {"x": _LEFT_PX, "y": top, "url": tile(block.pixels, lossless=True)}
        pictures.append(places([row], "image", width=width, height=height, align="left", baseline="top"))
        top += height + 12
    count = sum(block.count for block in blocks)
    return Figure(
        name="kernels",
        title="Kernels of the first layer",
        caption=f"The {count} kernels of conv1, 11 x 11 pixels in R, G and B, {_in_words(len(blocks))}. Each is scaled to its "
        "own largest weight; grey is zero. In the paper (figure 3) the kernels of one tower became largely free of colour and "
        f"those of the other full of it.{activation}",
        alt=f"{count} small pictures of kernels: " + "; ".join(block.heading for block in blocks),
        spec=drawing(
            [
                *pictures,
                places(words, "text", align="left", baseline="alphabetic", fontSize=13, fontWeight=600),
                places(numbers, "text", align="right", baseline="middle", fontSize=11),
            ],
            _LEFT_PX + max(block.pixels.shape[1] for block in blocks),
            top,
        ),
        data={"towers": [np.round(kernels, 6).tolist() for kernels in towers]},
    )


def save_sheet(path: Path, towers: Sequence[Tensor], title: str) -> None:
    """Write the kernels, with their title and the names of the towers, as a PNG file; a reader never sees a part of it.

    This needs no other package than PIL: a training calls it after each epoch.
    """
    sheet = _sheet([weights.detach().cpu().numpy() for weights in towers], title)
    part = path.with_suffix(".part.png")  # renamed when complete
    sheet.save(part)
    part.replace(path)


def _sheet(towers: Sequence[Weights], title: str) -> Image.Image:
    blocks = _blocks(towers)
    width = _LEFT_PX + max(block.pixels.shape[1] for block in blocks) + 2 * _GAP_PX
    height = sum(block.pixels.shape[0] + _HEADING_PX for block in blocks) + _HEADING_PX + 3 * _GAP_PX
    sheet = Image.new("RGB", (width, height), "white")
    pen, large, small = ImageDraw.Draw(sheet), _font(_FONT_PX), _font(_FONT_PX - 3)
    pen.text((_LEFT_PX + _GAP_PX, 2 * _GAP_PX), title, _INK, large)
    top = _HEADING_PX + _GAP_PX
    for block in blocks:
        pen.text((_LEFT_PX + _GAP_PX, top + 2 * _GAP_PX), block.heading, _INK, small)
        top += _HEADING_PX
        tiles = Image.fromarray(block.pixels)
        sheet.paste(tiles, (_LEFT_PX, top), tiles)
        for first, y in block.rows:
            pen.text((2 * _GAP_PX, top + y - 7), str(first), _INK, small)
        top += block.pixels.shape[0]
    return sheet


def _font(size: int) -> Any:
    """Return PIL's own font; without FreeType it has one size."""
    return ImageFont.load_default(size) if features.check("freetype2") else ImageFont.load_default()


def _blocks(towers: Sequence[Weights]) -> list[_Block]:
    blocks, first = [], 1
    for index, kernels in enumerate(towers):
        last = first + len(kernels) - 1
        name = f"tower {index}" if len(towers) > 1 else "the only tower"
        blocks.append(_block(kernels, f"{name}: kernels {first} to {last}", first))
        first = last + 1
    return blocks


def _block(kernels: Weights, heading: str, first: int) -> _Block:
    per_row = min(PER_ROW, len(kernels))
    side = kernels.shape[-1]
    scale = min(_LARGEST_SCALE, max(1, ((WIDTH_PX - _LEFT_PX) // per_row - _GAP_PX) // side))
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)  # (K, 1, 1, 1)
    grey = _GREY_LEVEL + _GREY_LEVEL * kernels / np.maximum(largest, np.finfo(np.float32).tiny)
    tiles = grey.round().astype(np.uint8).transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    pitch = tiles.shape[1] + _GAP_PX  # tiles are (K, scale * side, scale * side, 3)
    rows = -(-len(tiles) // per_row)
    pixels = np.zeros((rows * pitch + _GAP_PX, per_row * pitch + _GAP_PX, 4), np.uint8)
    for i, each in enumerate(tiles):
        top, left = _GAP_PX + i // per_row * pitch, _GAP_PX + i % per_row * pitch
        place = pixels[top : top + len(each), left : left + len(each)]
        place[..., :3], place[..., 3] = each, 255
    return _Block(heading, first, len(kernels), pitch, per_row, pixels)


def _in_words(towers: int) -> str:
    return "tower above tower" if towers > 1 else "of the only tower"
