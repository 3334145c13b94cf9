"""A small synthetic dataset, and digests of its batches, for tools that compare what clients receive byte for byte."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from loader_service import Batch
from loader_service.data.manifest import Statistics
from loader_service.data.writer import Writer
from loader_service.types import RECORD_SIDE_PX

RECORDS: Final = 400
"""Enough for several slices per worker, and for an epoch of a few seconds."""


def write(folder: Path, records: int = RECORDS, side: int = RECORD_SIDE_PX) -> None:
    """Write FOLDER/train.lmdb: raw records without symmetry, so that any mix-up changes bytes.

    Args:
        folder: an existing folder.
        records: number of records; up to 131,072 are all different.
        side: width and height of the records, in pixels.
    """
    y, x, channel = np.ogrid[:side, :side, :3]  # (side, 1, 1), (1, side, 1), (1, 1, 3)
    statistics = Statistics(  # made up: the jitter needs a basis, and no test depends on its values
        mean_image=np.full((side, side, 3), 127.5, np.float32),
        channel_means=np.full(3, 127.5),
        covariance=np.diag([0.09, 0.04, 0.01]),
        eigenvalues=np.array([0.09, 0.04, 0.01]),
        eigenvectors=np.eye(3),
    )
    with Writer(folder / "train.lmdb", codec="raw", class_names=("even", "odd")) as writer:
        for number in range(records):
            # (side, side, 3) by broadcasting; the product breaks the symmetry of the linear pattern.
            pixels = ((3 * y + 5 * x + 80 * channel + 37 * number + (y * x) // 64) // 2 % 256).astype(np.uint8)
            # The pattern repeats after 512 numbers.
            pixels[::8, ::8] = number // 512 % 256
            writer.put(number % 2, pixels.tobytes(), f"{number}")
        writer.finish(statistics, made_by={"made by": "tools.sample_dataset"})


@contextmanager
def given_or_made(data: Path | None, records: int = RECORDS, side: int = RECORD_SIDE_PX) -> Iterator[Path]:
    """Yield the data directory that the user named, or a synthetic one that is removed afterwards."""
    if data:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="loader-service-dataset-") as folder:
        write(Path(folder), records, side)
        yield Path(folder)


def digest(batch: Batch) -> str:
    """Return a digest, in hexadecimal, of every byte of a batch's arrays."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in (batch.images, batch.labels, batch.ids, batch.sources, batch.draws):
        hashed.update(array.tobytes())  # of the draws also the padding, which fill() writes as zeros
    return hashed.hexdigest()
