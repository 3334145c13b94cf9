"""Sheets of pictures: guesses, nearest neighbours, and one picture as training gets it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.data.samples import FedSample
from trainer.report import pictures
from trainer.report.pictures import Guessed, Neighbour

Words = Callable[[str], list[str]]
GREY = np.full((64, 64, 3), 128, np.uint8)


def guessed(label: str, best: str) -> Guessed:
    return Guessed(7, GREY, label, [(best, 0.75), ("b" * 40, 0.2), ("cat", 0.001)])


def test_the_true_class_is_marked(words: Words) -> None:
    """Each picture has its class and the probabilities of its guesses; long names are shortened; marks are not colour alone."""
    figure = pictures.guesses([guessed("ant & <i>", "ant & <i>"), guessed("cat", "dog")], "Chosen by lot.")
    shown = words(figure.svg())
    assert {"ant & <i>", "ant & <i> 75%", "cat", "cat below 1%", f"{'b' * 21}\N{HORIZONTAL ELLIPSIS} 20%"} <= set(shown)
    assert figure.svg().count('stroke-width="2"') == 2  # a check mark for each picture whose class is among the guesses
    assert figure.alt.startswith("The best guess is right for 1 of 2 pictures")
    assert figure.data[1]["guesses"][0] == {"class": "dog", "probability": 0.75}
    assert figure.svg().count("data:image/jpeg;base64,") >= 2


def test_neighbours_have_classes_and_distances(words: Words) -> None:
    """Each row has a picture and its neighbours with class and distance; those of the same class are framed and marked."""
    near = [Neighbour(1, GREY, "ant", 0.5), Neighbour(2, GREY, "bee", 12.5)]
    figure = pictures.neighbours([(guessed("ant", "bee"), near)], "fc7", "All were compared.")
    shown = words(figure.svg())
    assert shown.count("ant") == 2
    assert figure.svg().count('stroke-width="3"') == 1  # a frame
    assert {"bee", "0.50", "12.50"} <= set(shown)
    assert "fc7" in figure.caption
    assert figure.alt.startswith("1 of 2 nearest training pictures are of the same class")
    pictures.neighbours([(guessed("cat", "bee"), near)], "fc7", "").svg()  # no frames at all


def test_the_crops_of_a_picture_are_told_in_words(words: Words) -> None:
    """Each epoch's crop has its place, flip and jitter."""
    fed = [FedSample(n, GREY, y=n, x=2 * n, flip=n == 1, shift=(n, -n, 0)) for n in range(pictures.EPOCHS)]
    figure = pictures.augmentation(np.zeros((72, 72, 3), np.uint8), fed, "bee", 12)
    shown = words(figure.svg())
    assert {"record 12: bee", "epoch 1", "epoch 6", "from 2, 1, mirrored", "from 4, 2", "RGB +2, -2, +0"} <= set(shown)
    assert figure.data["samples"][1] == {"epoch": 1, "y": 1, "x": 2, "flip": True, "shift": [1, -1, 0]}
