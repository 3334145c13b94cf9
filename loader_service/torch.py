"""A wrapper around a Loader for PyTorch training loops: batches as tensors, on a device.

>>> from loader_service import Loader
>>> from loader_service.torch import TensorLoader
>>> with Loader() as loader, TensorLoader(loader, device="cuda:0") as batches:  # doctest: +SKIP
...     for batch in batches:
...         train(batch.images, batch.labels)

On the CPU a tensor is a view of the loader's slot, without a copy. On a GPU the slots are registered as pinned memory,
and each batch is copied on a side stream while the one before it trains. A slot is returned when its copy has finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loader_service.client.loader import Batch, Loader
from loader_service.errors import OptionError


class TensorBatch(NamedTuple):
    """A batch of B samples as tensors on one device; with a ten-crop view, V = 10 images per sample.

    Fields:
        images: (B, [V,] side, side, 3) RGB, channels last; uint8, float16 or float32, the loader's dtype.
        labels, ids, sources: (B,) int64.
        y, x: (B, [V]) int64, first row and column of the crop in its record.
        flip: (B, [V]) bool.
        shift: (B, [V,] 3) int16, colour shift of R, G, B in grey levels.
        epoch, start: the epoch, from 0, and the position of the first sample in it.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    sources: Tensor
    y: Tensor
    x: Tensor
    flip: Tensor
    shift: Tensor
    epoch: int
    start: int


@dataclass
class _Copy:
    """A batch whose copies to the device are issued, with the host arrays that must live until they are done."""

    tensors: TensorBatch
    source: Batch
    state: dict[str, Any]  # the loader's, just after this batch
    copied: torch.cuda.Event | None  # None on the CPU, where nothing is copied


class TensorLoader:
    """An iterator over a loader's batches as tensors on a device.

    Save its ``state_dict``, not the loader's, which is ahead by the batches that are being copied.

    Args:
        loader: an open Loader; the caller closes it, after this.
        device: device of the tensors.

    Raises:
        OptionError: PyTorch has no such device.
    """

    def __init__(self, loader: Loader, device: str | torch.device = "cpu") -> None:
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise OptionError("device", device, "cpu or a CUDA device such as cuda:0") from error
        if self.device.type not in ("cpu", "cuda") or (self.device.type == "cuda" and not torch.cuda.is_available()):
            raise OptionError("device", str(device), "cpu, or cuda where PyTorch finds a GPU")
        self._loader = loader
        self._state = loader.state_dict()
        self._issued: deque[_Copy] = deque()
        self._copying: deque[_Copy] = deque()  # handed out; their slots wait for their copies
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pinned = _pin(loader.memory) if self._stream else 0

    def __len__(self) -> int:
        """Return the number of batches in one epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[TensorBatch]:
        return self

    def __next__(self) -> TensorBatch:
        lookahead = 1 if self._stream else 0  # on a GPU the next batch is copied while this one trains
        while len(self._issued) <= lookahead:
            batch = next(self._loader, None)
            if batch is None:
                break
            self._issued.append(self._issue(batch))
        if not self._issued:
            raise StopIteration
        item = self._issued.popleft()
        self._state = item.state
        self._settle(item)
        return item.tensors

    def state_dict(self) -> dict[str, Any]:
        """Return the first position that this iterator has not returned; see :meth:`Loader.state_dict`."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place; see :meth:`Loader.load_state_dict`."""
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()
        self._wait_for_copies()
        self._issued.clear()

    def close(self) -> None:
        """Wait for copies in progress and unregister the loader's memory."""
        self._wait_for_copies()
        self._issued.clear()
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._pinned))
            self._pinned = 0

    def __enter__(self) -> TensorLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _issue(self, batch: Batch) -> _Copy:
        """Start copying a batch to the device; on the CPU, return views of it."""
        state = self._loader.state_dict()
        host = (batch.images, batch.labels, batch.ids, batch.sources)
        # A struct's fields have strides that no tensor can have, so they are copied: a few bytes per sample.
        drawn = [np.ascontiguousarray(batch.draws[name]) for name in ("y", "x", "flip", "shift")]
        drawn[:2] = [places.astype(np.int64) for places in drawn[:2]]  # y and x serve as indices
        cpu = [torch.from_numpy(array) for array in (*host, *drawn)]
        if self._stream is None:
            return _Copy(TensorBatch._make([*cpu, batch.epoch, batch.start]), batch, state, None)
        with torch.cuda.stream(self._stream):
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in cpu]
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Copy(TensorBatch._make([*tensors, batch.epoch, batch.start]), batch, state, copied)

    def _settle(self, item: _Copy) -> None:
        """Make the consumer's stream wait for a batch's copies, and return the slots of copies that are done."""
        if item.copied is None:
            return
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(item.copied)
        for value in item.tensors:
            if isinstance(value, Tensor):
                # Allocated on the side stream: without this, freeing it would let that stream overwrite it in use.
                value.record_stream(consumer)
        # Queried, not waited for: next() must not block on a copy. The batch in the deque keeps its slot.
        self._copying.append(item)
        while self._copying and self._copying[0].copied is not None and self._copying[0].copied.query():
            self._copying.popleft()

    def _wait_for_copies(self) -> None:
        if self._stream:
            self._stream.synchronize()
        self._copying.clear()


def _pin(memory: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Register the slots as page-locked memory, from which copies are asynchronous; return its address."""
    address = int(memory.ctypes.data)
    _check(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
    return address


def _check(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not register the slots as pinned memory (error {int(code)})")
