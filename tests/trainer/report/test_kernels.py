"""Kernels of the first layer, in the report and in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.report import kernels
from trainer.report.drawing import WIDTH_PX


def test_both_towers_are_named_and_fill_the_width(words: Callable[[str], list[str]]) -> None:
    """The 96 kernels are three numbered rows of 16 for each tower, across the figure."""
    towers = [np.zeros((48, 3, 11, 11), np.float32)] * 2
    figure = kernels.figure(towers)
    document = figure.svg()
    shown = words(document)
    assert {"tower 0: kernels 1 to 48", "tower 1: kernels 49 to 96", "1", "17", "33", "49", "65", "81"} <= set(shown)
    assert 0.85 * WIDTH_PX < float(document.split('width="')[1].split('"')[0]) < 1.05 * WIDTH_PX
    assert np.shape(figure.data["towers"]) == (2, 48, 3, 11, 11)


def test_a_sheet_shows_each_kernel_on_its_own_scale(tmp_path: Path) -> None:
    """Zero is grey and a kernel's largest weight is full colour; there is no margin without a kernel on the right."""
    tower = torch.zeros(16, 3, 11, 11)
    tower[0, 0] = 0.5
    kernels.save_sheet(tmp_path / "kernels.png", [tower, tower], "First-layer kernels")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.png"]
    with Image.open(tmp_path / "kernels.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour): int(count) for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    side = 11 * 4
    assert found[255, 128, 128] == 2 * side**2
    assert found[128, 128, 128] >= 30 * side**2
    assert (pixels[:, -16:] < 255).any()
