"""The confusion matrix: numbers, scale and size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.report import confusion

Words = Callable[[str], list[str]]


def test_a_small_matrix_is_small_and_has_numbers(words: Words) -> None:
    """Three classes take some hundred pixels; cells have numbers, the scale is in percent, mistakes are listed."""
    figure = confusion.figure([[4, 0, 1], [1, 3, 0], [0, 0, 0]], ["a & b", "bee", "cat"], "Nine images.")
    document = figure.svg()
    assert float(document.split('width="')[1].split('"')[0]) < 420
    shown = words(document)
    assert {"a & b", "bee", "cat", "4", "3", "100%", "best guess", "true class"} <= set(shown)
    assert "0" not in shown
    assert list(figure.table[1:]) == [["a & b", "cat", "1"], ["bee", "a & b", "1"]]
    assert figure.alt.startswith("7 of 9 images are right (77.8%)")
    assert figure.data["confusion"] == [[4, 0, 1], [1, 3, 0], [0, 0, 0]]


def test_a_thousand_classes_are_added_up(words: Words) -> None:
    """A large matrix has at most SHOWN rows, which add neighbouring classes up, and no numbers; no image is lost."""
    counts = np.zeros((1000, 1000), int)
    counts[np.arange(1000), (np.arange(1000) + 1) % 1000] = 2
    figure = confusion.figure(counts.tolist(), [f"class {i}" for i in range(1000)], "")
    assert "added up" in figure.caption
    cells = figure.spec["layer"][0].get("data", figure.spec.get("data"))["values"]
    assert len(cells) <= confusion.SHOWN**2
    assert sum(cell["images"] for cell in cells) == 2000
    assert "32" not in words(figure.svg())  # 17 classes in a row, all but the last on the diagonal: 2 x 16
