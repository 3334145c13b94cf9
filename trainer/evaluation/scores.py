"""Evaluation metrics: top-1 and top-5 errors, overall and by class, and the confusion matrix.

All of them follow from two counts that add up over batches and processes: images of each class by best guess, and images of
each class outside the TOP best guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trainer.parallel.world import World

TOP: Final = 5
"""Guesses of the top-5 error, which counts an image as right if its class is among them (paper section 1)."""

MATRIX_CLASSES: Final = 20
"""Most classes for which a terminal shows the confusion matrix; beyond, it shows the worst classes and mistakes."""

_SHOWN: Final = 15
"""Rows in the tables of the worst classes and mistakes."""


class Evaluation(msgspec.Struct, frozen=True):
    """The results of an evaluation on a split.

    Fields:
        images: number of images.
        loss: mean of -log(probability of the label).
        top1_error, top5_error: fractions, 0 to 1.
        confusion: ``confusion[label][guess]``, number of images of class ``label`` with the best guess ``guess``.
        top5_missed: for each class, number of its images without it among the TOP best guesses.
    """

    images: int
    loss: float
    top1_error: float
    top5_error: float
    confusion: list[list[int]]
    top5_missed: list[int]


class ClassErrors(msgspec.Struct, frozen=True):
    """The errors of one class, 0 to 1; None if the split has no image of it."""

    name: str
    images: int
    top1_error: float | None
    top5_error: float | None


class ScoreCounter:
    """Counts over batches, kept on their device: no batch waits for it, and ``evaluation`` waits once."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None  # (), float64, a sum
        self._confusion = torch.zeros(0, dtype=torch.int64)  # (classes * classes,), label by label
        self._missed = torch.zeros(0, dtype=torch.int64)  # (classes,)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            probabilities: (B, classes) float32.
            labels: (B,) int64, on the same device.
        """
        classes = probabilities.shape[1]
        of_label = probabilities.gather(1, labels[:, None])  # (B, 1)
        best = probabilities.topk(min(TOP, classes)).indices  # (B, TOP)
        missed = (best != labels[:, None]).all(1)  # (B,)
        # A probability of 0 gives a large but finite loss.
        loss = -of_label.clamp_min(torch.finfo(of_label.dtype).tiny).log().double().sum()
        # Additions at indices: bincount and boolean indices give results whose size the host would have to wait for.
        confusion = labels.new_zeros(classes**2).index_add_(0, labels * classes + best[:, 0], torch.ones_like(labels))
        by_class = labels.new_zeros(classes).index_add_(0, labels, missed.to(labels.dtype))
        if self._loss is None:
            self._loss, self._confusion, self._missed = loss, confusion, by_class
        else:
            self._loss, self._confusion, self._missed = (
                self._loss + loss,
                self._confusion + confusion,
                self._missed + by_class,
            )

    def evaluation(self, world: World | None) -> Evaluation:
        """Return the results of all batches in all processes of ``world``, which all call this."""
        classes, mine = len(self._missed), [0.0]
        if self._loss is not None:  # one transfer of all; float64 is exact for counts up to 2^53
            mine = torch.cat([self._loss[None], self._confusion.double(), self._missed.double()]).tolist()
        if world and world.size > 1:  # without tower 0 or a batch, a process does not know the classes
            classes = int(max(row[0] for row in world.gather([classes])))
            rows = world.gather(mine if self._loss is not None else [0.0] * (1 + classes**2 + classes))
            mine = [sum(column) for column in zip(*rows, strict=True)]
        counts = [round(count) for count in mine[1:]]
        confusion = [counts[label * classes : (label + 1) * classes] for label in range(classes)]
        missed = counts[classes**2 :]
        images = sum(map(sum, confusion))
        right = sum(confusion[label][label] for label in range(classes))
        return Evaluation(
            images=images,
            loss=mine[0] / max(1, images),
            top1_error=(images - right) / max(1, images),
            top5_error=sum(missed) / max(1, images),
            confusion=confusion,
            top5_missed=missed,
        )


def class_errors(result: Evaluation, names: Sequence[str]) -> list[ClassErrors]:
    """Return the errors of each class; ``names`` are in the order of the labels."""
    found = []
    for label, (name, row, missed) in enumerate(zip(names, result.confusion, result.top5_missed, strict=True)):
        images = sum(row)
        top1 = (images - row[label]) / images if images else None
        found.append(ClassErrors(name, images, top1, missed / images if images else None))
    return found


def tables(result: Evaluation, names: Sequence[str]) -> list[Table]:
    """Return tables for a terminal: errors by class and confusion matrix, or the worst of both if there are many classes."""
    classes = class_errors(result, names)
    if len(names) <= MATRIX_CLASSES:
        return [_errors(classes), _matrix(result, names)]
    worst = sorted(classes, key=lambda each: each.top1_error or 0.0, reverse=True)[:_SHOWN]
    return [_errors(worst, f"The {len(worst)} worst of {len(names)} classes"), _mistakes(result, names)]


def _errors(classes: Sequence[ClassErrors], title: str = "Errors of each class") -> Table:
    table = Table("class", title=title)
    for heading in ("images", "top-1 error", "top-5 error"):
        table.add_column(heading, justify="right")
    for each in classes:
        shares = ("-" if share is None else f"{share:.1%}" for share in (each.top1_error, each.top5_error))
        table.add_row(Text(each.name), str(each.images), *shares)
    return table


def _matrix(result: Evaluation, names: Sequence[str]) -> Table:
    table = Table("class", title="Confusion matrix: rows are classes, columns are guesses")
    for label in range(len(names)):
        table.add_column(str(label), justify="right")
    for label, (name, row) in enumerate(zip(names, result.confusion, strict=True)):
        table.add_row(Text(f"{label} {name}"), *(str(count) if count else "·" for count in row))
    return table


def _mistakes(result: Evaluation, names: Sequence[str]) -> Table:
    cells = [
        (count, names[label], names[guess])
        for label, row in enumerate(result.confusion)
        for guess, count in enumerate(row)
        if count and guess != label
    ]
    table = Table("class", "guess", title="Most frequent mistakes")
    table.add_column("images", justify="right")
    for count, label, guess in sorted(cells, key=lambda cell: -cell[0])[:_SHOWN]:
        table.add_row(Text(label), Text(guess), str(count))
    return table
