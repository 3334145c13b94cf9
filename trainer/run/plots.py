"""Figures of a run: the first layer's kernels (figure 3 of the paper), learning curves, and the confusion matrix.

The kernels are a PNG file, the others SVG documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from trainer.run import svg
from trainer.run.folder import RunFolder, write_atomically
from trainer.run.progress import EpochRecord, StepRecord

_PER_ROW: Final = 16  # as in figure 3
_SCALE: Final = 4  # pixels per weight
_GAP_PX: Final = 4
_BETWEEN_TOWERS_PX: Final = 24
_PANEL_PX: Final = (420, 260)
_MARGIN_PX: Final = 48
_MATRIX_PX: Final = 800
_NAMED_CLASSES: Final = 60
"""Most classes whose names fit next to the matrix."""

_RIGHT, _WRONG = (26, 127, 55), (207, 34, 46)
"""Full colours of right and wrong guesses, R, G, B; cells fade to white with the share of the class's images."""

_MAX_POINTS: Final = 1000
"""Most points of a curve; more would enlarge the file without a visible difference."""


@dataclass(frozen=True)
class Curve:
    """A curve of a panel: name, colour, and points (step, value)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


def draw(folder: RunFolder, kernels: Sequence[Tensor]) -> list[Path]:
    """Draw kernels and curves into a run's folder and return their paths; ``kernels`` has (K, 3, 11, 11) for each tower."""
    part = folder.kernels.with_suffix(".part.png")  # renamed when complete
    Image.fromarray(kernel_picture([weights.detach().cpu().numpy() for weights in kernels])).save(part)
    part.replace(folder.kernels)
    steps, epochs = read_log(folder.log)
    write_atomically(folder.curves, learning_curves(steps, epochs).encode())
    return [folder.kernels, folder.curves]


def kernel_picture(towers: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint8]:
    """Return the first layer's kernels as an image, 16 per row, one tower below the other, as in figure 3.

    Args:
        towers: for each tower (K, 3, 11, 11); each kernel is scaled to its own largest weight, and 0 is grey.

    Returns:
        (height, width, 3) uint8, R, G, B.
    """
    blocks = [_kernel_block(kernels) for kernels in towers]
    white = np.full((_BETWEEN_TOWERS_PX, blocks[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([piece for block in blocks for piece in (block, white)][:-1])


def _kernel_block(kernels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)  # (K, 1, 1, 1)
    grey = 127.5 + 127.5 * kernels / np.maximum(largest, np.finfo(np.float32).tiny)
    tiles = grey.round().astype(np.uint8).transpose(0, 2, 3, 1).repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
    pitch = tiles.shape[1] + _GAP_PX  # tiles are (K, 44, 44, 3)
    rows = -(-len(tiles) // _PER_ROW)
    block = np.full((rows * pitch + _GAP_PX, _PER_ROW * pitch + _GAP_PX, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = _GAP_PX + i // _PER_ROW * pitch, _GAP_PX + i % _PER_ROW * pitch
        block[top : top + len(tile), left : left + len(tile)] = tile
    return block


def read_log(path: Path) -> tuple[list[StepRecord], list[EpochRecord]]:
    """Return the steps and epochs of a log, in order; the last version of a step that was repeated after a crash."""
    steps: dict[int, StepRecord] = {}
    epochs: dict[int, EpochRecord] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = msgspec.json.decode(line)
            if row["event"] == "step":
                steps[row["step"]] = msgspec.convert(row, StepRecord)
            elif row["event"] == "epoch":
                epochs[row["epoch"]] = msgspec.convert(row, EpochRecord)
        except (msgspec.DecodeError, KeyError, TypeError):
            continue  # a line that a crash cut off
    return [steps[step] for step in sorted(steps)], [epochs[epoch] for epoch in sorted(epochs)]


def learning_curves(steps: Sequence[StepRecord], epochs: Sequence[EpochRecord]) -> str:
    """Return loss and error of training and validation by step, as an SVG document."""
    steps = steps[:: max(1, len(steps) // _MAX_POINTS)]
    loss = [
        Curve("training", "#999999", [(r.step, r.loss) for r in steps]),
        Curve("validation", "#d62728", [(r.step, r.val_loss) for r in epochs]),
    ]
    error = [
        Curve("training", "#999999", [(r.step, r.error) for r in steps]),
        Curve("validation, top-1", "#d62728", [(r.step, r.val_top1_error) for r in epochs]),
        Curve("validation, top-5", "#1f77b4", [(r.step, r.val_top5_error) for r in epochs]),
    ]
    panel_width, panel_height = _PANEL_PX[0] + 2 * _MARGIN_PX, _PANEL_PX[1] + 2 * _MARGIN_PX
    return svg.document(2 * panel_width, panel_height, [_panel("loss", loss, 0), _panel("error", error, panel_width)])


def _panel(title: str, curves: Iterable[Curve], left: int) -> str:
    """Return one diagram: axes from 0 to the largest values, the lines and their names."""
    curves = [curve for curve in curves if curve.points]
    width, height = _PANEL_PX
    x_max = max((x for curve in curves for x, _ in curve.points), default=1.0) or 1.0
    y_max = max((y for curve in curves for _, y in curve.points), default=1.0) or 1.0
    parts = [
        svg.element("path", d=f"M0 0V{height}H{width}", fill="none", stroke="black"),  # both axes
        svg.text(0, -12, title, font_size=14),
        svg.text(-6, 10, f"{y_max:.3g}", text_anchor="end"),
        svg.text(-6, height, "0", text_anchor="end"),
        svg.text(width, height + 18, f"step {x_max:g}", text_anchor="end"),
    ]
    for row, curve in enumerate(curves):
        places = [(x / x_max * width, height - y / y_max * height) for x, y in curve.points]
        parts.append(svg.polyline(places, stroke=curve.colour, stroke_width=1.5))
        parts += [svg.circle(x, y, 2, fill=curve.colour) for x, y in places[-1:]]  # a single point has no line
        parts.append(svg.text(width - 4, 12 + 16 * row, curve.name, text_anchor="end", fill=curve.colour))
    return svg.group(parts, transform=f"translate({left + _MARGIN_PX} {_MARGIN_PX})")


def confusion_svg(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return a confusion matrix as an SVG document, with a row for each class and a column for each guess.

    A cell is darker the larger its share of the class's images: green for right guesses, red for wrong ones.

    Args:
        confusion: ``confusion[label][guess]``, numbers of images.
        names: names of the classes, drawn if there are at most 60.
    """
    counts = np.asarray(confusion, np.float64)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))  # (classes, classes), rows sum to 1
    colours = np.where(np.eye(len(names), dtype=bool)[..., None], _RIGHT, _WRONG)
    cells = (255 - shares[..., None] * (255 - colours)).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(cells).save(file, "PNG")
    named = len(names) <= _NAMED_CLASSES
    cell, left = _MATRIX_PX / len(names), 200 if named else _MARGIN_PX
    size = left + _MATRIX_PX + _MARGIN_PX
    caption = f"rows: classes; columns: guesses; {int(counts.sum()):,} images"
    parts = [
        svg.image(left, left, _MATRIX_PX, _MATRIX_PX, file.getvalue()),
        svg.rect(left, left, _MATRIX_PX, _MATRIX_PX, fill="none", stroke="black"),
        svg.text(8, 20, caption),
    ]
    for label, name in enumerate(names if named else ()):
        middle = left + (label + 0.5) * cell
        parts.append(svg.text(left - 6, middle + 4, name, text_anchor="end"))
        upwards = f"translate({middle + 4:.1f} {left - 6}) rotate(-90)"
        parts.append(svg.element("text", name, transform=upwards))
    return svg.document(size, size, parts)
