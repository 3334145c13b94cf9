"""NVIDIA DALI over JPEG files: ``python -m tools.bench.peers.dali jpeg|jpeg-gpu RECORDS WORKERS``.

Only the crop is decoded, as DALI's documentation advises; files are read once and stay in memory. ``jpeg`` decodes on the
CPU; ``jpeg-gpu`` on the GPU, where batches stay, as DALI's users keep them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from tools.bench.turns import BATCH, SHAPE, deliver, serve


def graph(folder: str, device: str) -> Any:
    """Build the pipeline from files to flipped crops, uint8 in height-width-channel order; decode on ``device``."""
    content, _ = fn.readers.file(
        files=[str(path) for path in sorted(Path(folder).glob("*.jpg"))],
        random_shuffle=True,
        initial_fill=1024,  # size of DALI's shuffle buffer, in files
        dont_use_mmap=False,
        name="files",
    )
    # A share of the free range: 0 is the first column or row, 1 the last that fits.
    x, y = fn.random.uniform(range=(0.0, 1.0)), fn.random.uniform(range=(0.0, 1.0))
    images = fn.decoders.image_crop(
        content, device=device, output_type=types.RGB, crop=SHAPE[:2], crop_pos_x=x, crop_pos_y=y
    )
    return fn.flip(images, horizontal=fn.random.coin_flip())


def batches(folder: Path, workers: int, on_gpu: bool) -> Iterator[Any]:
    """Yield batches endlessly: (128, 224, 224, 3) uint8, or DALI's list of them on the GPU."""
    made = pipeline_def(graph)(
        str(folder / "files"),
        "mixed" if on_gpu else "cpu",
        batch_size=BATCH,
        num_threads=workers,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=4,
    )
    made.build()
    while True:
        (images,) = made.run()  # waits until the batch is made, on a GPU too
        yield images if on_gpu else np.asarray(images.as_tensor())


if __name__ == "__main__":
    gpu = sys.argv[1] == "jpeg-gpu"
    made_batches = batches(Path(sys.argv[2]), int(sys.argv[3]), gpu)
    if gpu:
        deliver(len(images) for images in made_batches)
    else:
        serve(made_batches)
