"""PyTorch's DataLoader over LMDB or over JPEG files: ``python -m tools.bench.peers.dataloader FORM RECORDS WORKERS``.

Its fastest fair form: workers make whole batches (a batch sampler as the sampler, no collation), directly in the tensor that
is passed through shared memory; workers are persistent and prefetch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from tools.bench.turns import BATCH, SHAPE, serve

HEADER_BYTES = 16  # loader_service.data.codecs.HEADER, a package that this environment lacks
RECORD_SHAPE = (256, 256, 3)


class Batches(Dataset[torch.Tensor]):
    """A dataset of batches, indexed by lists of record numbers: (n, 224, 224, 3) uint8, randomly cropped and flipped.

    Args:
        form: ``raw`` or ``jpeg`` records in LMDB, or ``files``, decoded by Pillow.
        folder: folder of the records in all formats.
    """

    def __init__(self, form: str, folder: Path) -> None:
        self._form, self._folder = form, folder
        self._env: Any = None
        self._records: Any = None

    def __len__(self) -> int:
        return len((self._folder / "labels.txt").read_text().splitlines())

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        out = torch.empty((len(numbers), *SHAPE), dtype=torch.uint8)
        images, side = out.numpy(), SHAPE[0]  # shares the tensor's memory
        crops = np.random.randint(0, RECORD_SHAPE[0] - side + 1, (len(numbers), 2))  # noqa: NPY002 -- a worker's own seed
        for i, (number, (y, x)) in enumerate(zip(numbers, crops.tolist(), strict=True)):
            pixels = self._pixels(number)[y : y + side, x : x + side]
            images[i] = pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels
        return out

    def _pixels(self, number: int) -> Any:
        if self._form == "files":
            with Image.open(self._folder / "files" / f"{number:05}.jpg") as image:
                return np.asarray(image)
        if self._env is None:  # in the worker: an LMDB environment does not survive a fork
            path = self._folder / self._form / "train.lmdb"
            # No lock file: a finished environment never changes. No read-ahead: access is random.
            self._env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=3, readahead=False)
            self._records = self._env.open_db(b"records", create=False)
        with self._env.begin(db=self._records, buffers=True) as txn:
            payload = txn.get(number.to_bytes(8, "big"))[HEADER_BYTES:]
            if self._form == "jpeg":
                return simplejpeg.decode_jpeg(payload, colorspace="RGB")
            # The view outlives its transaction: nothing writes to the environment, so its pages stay mapped and
            # unchanged.
            return np.frombuffer(payload, np.uint8).reshape(RECORD_SHAPE)


def batches(form: str, folder: Path, workers: int) -> Iterator[Any]:
    """Yield batches endlessly: (128, 224, 224, 3) uint8."""
    dataset = Batches(form, folder)
    sampler = BatchSampler(RandomSampler(dataset), BATCH, drop_last=True)
    # batch_size=None turns automatic batching off: each list of the sampler goes to __getitem__ as it is.
    loader = DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=workers, persistent_workers=True, prefetch_factor=4
    )
    while True:
        for batch in loader:
            yield batch.numpy()  # a view of the shared memory, no copy


if __name__ == "__main__":
    serve(batches(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
