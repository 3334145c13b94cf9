"""Evaluation metrics and their tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from trainer.evaluation.scores import Evaluation, ScoreCounter, class_errors, tables


def guesses(classes: int, labels: list[int], best: list[int]) -> Evaluation:
    """Return an evaluation in which the best guess has the highest probability, and the next classes (in a ring) less and less."""
    rank = (np.arange(classes)[None, :] - np.array(best)[:, None]) % classes
    probabilities = torch.from_numpy(np.float32(1) / (1 + rank.astype(np.float32)))
    counter = ScoreCounter()
    counter.add(probabilities[:2], torch.tensor(labels[:2]))
    counter.add(probabilities[2:], torch.tensor(labels[2:]))
    return counter.evaluation(None)


def test_confusion_is_counted_over_batches() -> None:
    """Rows of the confusion matrix are classes, columns guesses, and the errors follow from it."""
    result = guesses(3, labels=[0, 0, 1, 2, 2], best=[0, 1, 1, 0, 0])
    assert result.confusion == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    assert result.images == 5
    assert result.top1_error == pytest.approx(3 / 5)
    assert result.top5_error == 0


def test_errors_of_each_class() -> None:
    """Errors are fractions of the class's own images; a class without images has None."""
    result = guesses(8, labels=[0, 0, 1, 2], best=[0, 1, 1, 3])
    assert result.top5_missed == [1, 0, 1, 0, 0, 0, 0, 0]  # guesses 1..5 miss 0, and 3..7 miss 2
    ant, bee, cat, dog, *_ = class_errors(result, "abcdefgh")
    assert (ant.images, ant.top1_error, ant.top5_error) == (2, 0.5, 0.5)
    assert (bee.images, bee.top1_error, bee.top5_error) == (1, 0.0, 0.0)
    assert (cat.images, cat.top1_error, cat.top5_error) == (1, 1.0, 1.0)
    assert (dog.images, dog.top1_error, dog.top5_error) == (0, None, None)


def test_nothing_evaluated_is_no_error() -> None:
    """An evaluation of nothing does not divide by zero."""
    assert ScoreCounter().evaluation(None).images == 0


def shown(result: Evaluation, names: list[str]) -> str:
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as printed:
        for table in tables(result, names):
            console.print(table)
    return printed.get()


def test_few_classes_are_shown_as_a_matrix() -> None:
    """Class names that look like markup are printed unchanged."""
    text = shown(guesses(3, labels=[0, 0, 1, 2, 2], best=[0, 1, 1, 0, 0]), ["[red]", "bee", "cat"])
    assert "[red]" in text
    assert "Confusion" in text


def test_of_many_classes_the_worst_are_shown() -> None:
    """With many classes the tables show the worst classes and the most frequent mistakes."""
    names = [f"class{label}" for label in range(30)]
    text = shown(guesses(30, labels=[7, 7, 7, 3], best=[9, 9, 9, 3]), names)
    mistakes = text.split("Most frequent mistakes")[1]
    assert "class7" in mistakes
    assert "class9" in mistakes
    assert "class3 " not in mistakes
