"""FFCV: ``python -m tools.bench.peers.ffcv raw|jpeg RECORDS WORKERS``.

A random-resized-crop decoder with a scale of (224 / 256) ** 2 and a ratio of 1 is a random 224 crop without resizing. The
file that it reads is written once, in FFCV's own format, from the same images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffcv.fields import RGBImageField
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip
from ffcv.writer import DatasetWriter
from PIL import Image

from tools.bench.turns import BATCH, SHAPE, serve

SHARE = (SHAPE[0] / 256) ** 2  # of the area: RandomResizedCrop's scale is a ratio of areas


class Images:
    """The images by number, for FFCV's writer."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Any]:
        with Image.open(self._paths[number]) as image:
            return (image.convert("RGB"),)


def written(form: str, folder: Path) -> Path:
    """Return FFCV's file of the records; write it if it does not exist."""
    path = folder / f"ffcv-{form}.beton"
    if not path.exists():
        partial = path.with_suffix(".partial")
        mode = "jpg" if form == "jpeg" else "raw"
        # Quality 90: as the jpeg records (codecs.DEFAULT_PARAMETERS).
        writer = DatasetWriter(str(partial), {"image": RGBImageField(write_mode=mode, jpeg_quality=90)}, num_workers=1)
        writer.from_indexed_dataset(Images(folder / "files"))
        partial.rename(path)  # under its name only when complete
    return path


def batches(form: str, folder: Path, workers: int) -> Iterator[Any]:
    """Yield batches endlessly: (128, 224, 224, 3) uint8."""
    decoder = RandomResizedCropRGBImageDecoder(SHAPE[:2], scale=(SHARE, SHARE), ratio=(1.0, 1.0))
    loader = Loader(
        str(written(form, folder)),
        batch_size=BATCH,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,  # the file fits in memory, as every contestant's records do
        drop_last=True,
        batches_ahead=3,
        pipelines={"image": [decoder, RandomHorizontalFlip()]},  # no ToTensor: NumPy arrays, height-width-channel
    )
    while True:
        for (images,) in loader:
            yield images


if __name__ == "__main__":
    serve(batches(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
