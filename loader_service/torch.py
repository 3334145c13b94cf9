"""Batches as tensors, on a device: a wrapper around a Loader for PyTorch training loops.

>>> from loader_service import Loader
>>> from loader_service.torch import TensorLoader
>>> with Loader() as loader, TensorLoader(loader, device="cuda:0") as batches:  # doctest: +SKIP
...     for batch in batches:
...         train(batch.images, batch.labels)

On the CPU a tensor is a view of the loader's slot, without a copy. On a GPU the slots are registered as pinned memory
and copied on a side stream, one batch ahead, while the last batch trains; a slot goes back when its copy has finished.
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
    """A batch of B samples as tensors on one device; V pictures per sample only for ten-crop views.

    Fields:
        images: (B, [V,] side, side, 3) uint8, float16 or float32, as the loader's dtype says; RGB, channels last.
        labels, ids, sources: (B,) int64.
        y, x: (B, [V]) int64, the crop's place in its record.
        flip: (B, [V]) bool.
        shift: (B, [V,] 3) int16, the colour shift in grey levels.
        epoch, start: the epoch, and the position of the first sample in it.
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
class _Ahead:
    """A batch whose copies have been issued, and what must live until they are done."""

    tensors: TensorBatch
    source: Batch
    state: dict[str, Any]  # of the loader, just after this batch
    copied: torch.cuda.Event | None


class TensorLoader:
    """Iterates over a loader's batches as tensors on a device.

    Its ``state_dict`` is the one to save: the loader's own runs ahead by the batches that are being copied.

    Args:
        loader: an open Loader; it stays the caller's to close, after this.
        device: where the tensors go.

    Raises:
        OptionError: there is no such device.
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
        self._ahead: deque[_Ahead] = deque()
        self._copying: deque[_Ahead] = deque()  # handed out; their slots wait for their copies
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pinned = _pin(loader.memory) if self._stream else 0

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[TensorBatch]:
        return self

    def __next__(self) -> TensorBatch:
        lookahead = 1 if self._stream else 0
        while len(self._ahead) <= lookahead:
            batch = next(self._loader, None)
            if batch is None:
                break
            self._ahead.append(self._issue(batch))
        if not self._ahead:
            raise StopIteration
        item = self._ahead.popleft()
        self._state = item.state
        self._settle(item)
        return item.tensors

    def state_dict(self) -> dict[str, Any]:
        """The first position that this iterator has not returned; see :meth:`Loader.state_dict`."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; see :meth:`Loader.load_state_dict`."""
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()
        self._wait_for_copies()
        self._ahead.clear()

    def close(self) -> None:
        """Wait for the copies under way and let the loader's memory go."""
        self._wait_for_copies()
        self._ahead.clear()
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._pinned))
            self._pinned = 0

    def __enter__(self) -> TensorLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _issue(self, batch: Batch) -> _Ahead:
        """Start copying a batch to the device; on the CPU there is nothing to copy."""
        state = self._loader.state_dict()
        host = (batch.images, batch.labels, batch.ids, batch.sources)
        # A struct's fields are strided; small copies of them are what a tensor can be made of.
        drawn = [np.ascontiguousarray(batch.draws[name]) for name in ("y", "x", "flip", "shift")]
        drawn[:2] = [places.astype(np.int64) for places in drawn[:2]]
        cpu = [torch.from_numpy(array) for array in (*host, *drawn)]
        if self._stream is None:
            return _Ahead(TensorBatch._make([*cpu, batch.epoch, batch.start]), batch, state, None)
        with torch.cuda.stream(self._stream):
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in cpu]
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Ahead(TensorBatch._make([*tensors, batch.epoch, batch.start]), batch, state, copied)

    def _settle(self, item: _Ahead) -> None:
        """Make the consumer's stream wait for the copies, and give back the slots of those that are done."""
        if item.copied is None:
            return
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(item.copied)
        for value in item.tensors:
            if isinstance(value, Tensor):
                value.record_stream(consumer)  # it was allocated on the side stream
        self._copying.append(item)
        while self._copying and self._copying[0].copied is not None and self._copying[0].copied.query():
            self._copying.popleft()

    def _wait_for_copies(self) -> None:
        if self._stream:
            self._stream.synchronize()
        self._copying.clear()


def _pin(memory: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Register the slots as page-locked memory, so that copies run by themselves; the address registered."""
    address = int(memory.ctypes.data)
    _check(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
    return address


def _check(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not register the slots as pinned memory (error {int(code)})")
