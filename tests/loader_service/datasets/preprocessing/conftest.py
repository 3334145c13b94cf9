"""Fixtures: small image folders, and the command as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from loader_service.cli import main

CLASSES = ("ant", "bee", "cat")


def write_picture(path: Path, number: int) -> None:
    """Write an image that differs for each number, in a size and mode that depend on the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=number))
    height, width = 60 + 7 * (number % 9), 50 + 11 * (number % 7)
    pixels = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    mode = ("RGB", "RGB", "L", "CMYK")[number % 4]
    Image.fromarray(pixels).resize((width, height)).convert(mode).save(path, "JPEG", quality=90)


def write_folder(root: Path, per_class: int, first: int = 0) -> Path:
    """Write an image folder with ``per_class`` images in each of CLASSES."""
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            write_picture(root / name / f"{number:03d}.jpg", first + 1000 * label + number)
    return root


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make ``train/`` with 26 images and a bad file in each of three classes, and ``val/`` with 5; tests must not change them."""
    root = tmp_path_factory.mktemp("album")
    write_folder(root / "train", 26)
    write_folder(root / "val", 5, first=500)
    for name in CLASSES:
        (root / "train" / name / "notes.txt").write_text(f"about {name}s")
    return root


@pytest.fixture
def preprocess() -> Callable[..., Result]:
    """``preprocess(source, out, *options)``: run the command in this process."""

    def run(source: Path, out: Path, *options: str) -> Result:
        arguments = ["preprocess", str(source), str(out), *options]
        return CliRunner().invoke(main, arguments if "--workers" in options else [*arguments, "--workers", "1"])

    return run


@pytest.fixture(scope="session")
def large_album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with 140 images in each class, whose raw records take several commits; tests must not change it."""
    return write_folder(tmp_path_factory.mktemp("large"), 140, first=10_000)
