"""Data made on the spot: synthetic photographs, and records cut from them in every format that a loader reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.bench.records import make
from tools.gpu.parts import Settings

PHOTOGRAPHS: Final = 1000
"""One class each: as many classes as ImageNet has, so that the last layer has its full size."""

SHAPE_PX: Final = (300, 400)
OCTAVES: Final = (3, 12, 48, 150)
"""Grid sizes of the noise that a photograph is summed from: large shapes with fine texture, like photographs."""

SEED: Final = 2


def records(settings: Settings) -> Path:
    """Return the folder of the records; make them, and the photographs, if they do not exist.

    ``FOLDER/raw/train.lmdb``, ``FOLDER/jpeg/train.lmdb`` and ``FOLDER/files/*.jpg`` are as in ``tools.bench.records``.
    """
    given = settings.photographs
    source = Path(given) if given else photographs(settings.work / "photographs", min(PHOTOGRAPHS, settings.records))
    folder = settings.work / f"records-{settings.records}"
    make(folder, source, settings.records)
    return folder


def photographs(folder: Path, count: int) -> Path:
    """Write ``count`` synthetic photographs as JPEG files into a folder, if they are not there; return the folder."""
    last = folder / f"{count - 1:04}.jpg"
    if not last.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(_images(count)):
            partial = folder / ".partial.jpeg"  # no *.jpg: an interrupted run leaves no broken photograph
            Image.fromarray(image).save(partial, "JPEG", quality=92)
            partial.rename(folder / f"{number:04}.jpg")
    return folder


def _images(count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield images of noise in several octaves, (300, 400, 3) uint8; a pure function of their number."""
    height, width = SHAPE_PX
    for number in range(count):
        chance = np.random.Generator(np.random.Philox(key=[SEED, number]))
        total = np.zeros((height, width, 3), np.float32)
        for grid in OCTAVES:
            coarse = Image.fromarray(chance.integers(0, 256, (grid, grid, 3), np.uint8))
            total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / len(OCTAVES)
        low, high = total.min(), total.max()
        yield ((total - low) * (255 / max(high - low, 1))).astype(np.uint8)
