"""SPDL over JPEG files: ``python -m tools.bench.peers.spdl jpeg RECORDS WORKERS``.

A pipeline of threads, with libjpeg-turbo, which releases the GIL, as the decoder; one stage makes a whole batch.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from spdl.pipeline import PipelineBuilder

from tools.bench.turns import BATCH, SHAPE, serve

AHEAD = 4


def chosen(paths: list[Path]) -> Iterator[list[Path]]:
    """Yield batches of paths endlessly, each epoch in a new order."""
    while True:
        random.shuffle(paths)
        for start in range(0, len(paths) - BATCH + 1, BATCH):  # whole batches only, as drop_last of the others
            yield paths[start : start + BATCH]


def load(paths: list[Path]) -> Any:
    """Make one batch: (n, 224, 224, 3) uint8."""
    out, side = np.empty((len(paths), *SHAPE), np.uint8), SHAPE[0]
    for image, path in zip(out, paths, strict=True):  # `image` is a view of `out`
        pixels = simplejpeg.decode_jpeg(path.read_bytes(), colorspace="RGB")
        # 33 = 256 - 224 + 1 places on each axis.
        y, x = random.randrange(33), random.randrange(33)  # noqa: S311
        crop = pixels[y : y + side, x : x + side]
        image[...] = crop[:, ::-1] if random.random() < 0.5 else crop  # noqa: S311
    return out


def batches(folder: Path, workers: int) -> Iterator[Any]:
    """Yield batches endlessly: (128, 224, 224, 3) uint8."""
    source = chosen(sorted((folder / "files").glob("*.jpg")))
    pipeline = PipelineBuilder().add_source(source).pipe(load, concurrency=workers).add_sink(AHEAD)
    with (built := pipeline.build(num_threads=workers)).auto_stop():
        yield from built


if __name__ == "__main__":
    serve(batches(Path(sys.argv[2]), int(sys.argv[3])))
