"""A wrapper around a Loader for PyTorch training loops: batches as tensors, on one device or several.

>>> from loader_service import Loader
>>> from loader_service.torch import TensorLoader
>>> with Loader() as loader, TensorLoader(loader, device="cuda:0") as batches:  # doctest: +SKIP
...     for batch in batches:
...         train(batch.images, batch.labels)

On the CPU a tensor is a view of the loader's slot, without a copy. For GPUs the slots are registered as pinned memory, and
each batch travels on a side stream while the one before it trains, in two copies: the pixels straight from their slot, and
everything else in one packet. A slot is returned when the copies from it have finished.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loader_service.client.loader import Batch, Loader
from loader_service.errors import LoaderServiceError, OptionError, PinnedMemoryError
from loader_service.types import EpochAccount

_PORTABLE: Final = 1
"""cudaHostRegisterPortable: the memory is pinned for every GPU, not only for the current one."""

_ALIGNMENT_BYTES: Final = 16
"""Alignment of the arrays in a packet: a multiple of every element's size, which torch needs to view bytes as elements."""

Array = npt.NDArray[Any]
Extra = Callable[[Batch], Mapping[str, Array]]


class TensorBatch(NamedTuple):
    """A batch of B samples as tensors on one device; with a ten-crop view, V = 10 images per sample.

    Fields:
        images: (B, [V,] side, side, 3) RGB, channels last; uint8, float16 or float32, the loader's dtype.
        labels, ids, sources: (B,) int64.
        y, x: (B, [V]) int64, first row and column of the crop in its record.
        flip: (B, [V]) bool.
        shift: (B, [V,] 3) int16, colour shift of R, G, B in grey levels.
        epoch, start: the epoch, from 0, and the position of the first sample in it.
        extra: what the TensorLoader's ``extra`` returned for this batch.
        copies: the same batch on each further device of the TensorLoader, in their order.
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
    extra: Mapping[str, Tensor]
    copies: tuple[TensorBatch, ...] = ()


@dataclass
class _Copy:
    """A batch whose copies to the devices are issued, with the host arrays that must live until they are done."""

    tensors: dict[torch.device, TensorBatch]
    source: Batch
    state: dict[str, Any]  # the loader's, just after this batch
    copied: dict[torch.device, torch.cuda.Event]  # empty on the CPU, where nothing is copied

    @property
    def is_done(self) -> bool:
        return all(event.query() for event in self.copied.values())


_users: weakref.WeakKeyDictionary[Loader, weakref.ref[TensorLoader]] = weakref.WeakKeyDictionary()
"""The open TensorLoader of each Loader."""


class TensorLoader:
    """An iterator over a loader's batches as tensors on a device.

    Save its ``state_dict``, not the loader's, which is ahead by the batches that are being copied; likewise for ``ledger``.

    Args:
        loader: an open Loader without another open TensorLoader; the caller closes it, after this.
        device: device of the tensors; or several, each of which gets every batch (see ``TensorBatch.copies``). A device
            that occurs twice gets one copy.
        extra: called once for each Batch, in order, at the latest when it is returned and on a GPU up to one batch earlier.
            The arrays that it returns, such as random masks, travel in the batch's packet and come back as
            ``TensorBatch.extra``, with the same names, shapes and dtypes.

    Fields:
        device: the first device.

    Raises:
        OptionError: PyTorch has no such device, or the loader has an open TensorLoader. Two of them would share the batches
            out between each other, and neither could say where the epoch stands.
        PinnedMemoryError: CUDA cannot register the slots.
    """

    def __init__(
        self,
        loader: Loader,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        extra: Extra | None = None,
    ) -> None:
        self._devices = _checked(device)
        self.device = self._devices[0]
        user = _users.get(loader)
        if user is not None and user() is not None:
            raise OptionError("loader", loader, "a Loader without another open TensorLoader: close that one first")
        self._loader, self._extra = loader, extra
        self._state = loader.state_dict()
        self._issued: deque[_Copy] = deque()
        self._copying: deque[_Copy] = deque()  # handed out; their slots wait for their copies
        self._streams = {each: torch.cuda.Stream(each) for each in dict.fromkeys(self._devices) if each.type == "cuda"}
        address = _pin(loader.memory, next(iter(self._streams))) if self._streams else None
        # A finaliser also unregisters the memory of a TensorLoader that is dropped without close().
        self._release: weakref.finalize[..., TensorLoader] = weakref.finalize(
            self, _release, address, list(self._streams.values())
        )
        _users[loader] = weakref.ref(self)

    def __len__(self) -> int:
        """Return the number of batches in one epoch."""
        return len(self._loader)

    def __iter__(self) -> TensorLoader:
        return self

    def __next__(self) -> TensorBatch:
        if not self._release.alive:
            raise ValueError("this TensorLoader is closed")
        self._return_slots()
        if not self._issued:
            if not self._loader.ready:
                self._wait_for_copies()  # the loader may be waiting for just these slots
            self._issue(next(self._loader))
        # On a GPU the next batch is copied while this one trains, if it is ready: this one does not wait for it.
        if self._streams and len(self._issued) == 1 and self._loader.ready:
            with suppress(StopIteration, LoaderServiceError):  # the loader raises them again at the next call
                self._issue(next(self._loader))
        item = self._issued.popleft()
        self._state = item.state
        self._settle(item)
        first, *others = (item.tensors[device] for device in self._devices)
        return first._replace(copies=tuple(others))

    @property
    def ledger(self) -> list[EpochAccount]:
        """The account of each epoch begun so far, of the batches that this iterator has returned; see :class:`EpochAccount`."""
        accounts = {account.epoch: account for account in self._loader.ledger}
        for item in self._issued:
            account, batch = accounts[item.source.epoch], item.source
            accounts[batch.epoch] = msgspec.structs.replace(
                account,
                delivered=account.delivered - len(batch.ids),
                substituted=account.substituted - int(np.count_nonzero(batch.ids != batch.sources)),
            )
        return list(accounts.values())

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
        """Wait for copies in progress and unregister the loader's memory; tensors that were returned stay valid."""
        if self._release.alive:
            self._wait_for_copies()
            self._issued.clear()
            _users.pop(self._loader, None)
            self._release()

    def __enter__(self) -> TensorLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _issue(self, batch: Batch) -> None:
        """Start copying a batch to the devices; for the CPU, take views of it."""
        item = _Copy({}, batch, self._loader.state_dict(), {})
        extra = self._extra(batch) if self._extra else {}
        # A struct's fields have strides that no tensor can have, so they are copied: a few bytes per sample.
        y, x, flip, shift = (np.ascontiguousarray(batch.draws[name]) for name in ("y", "x", "flip", "shift"))
        y, x = y.astype(np.int64), x.astype(np.int64)  # they serve as indices
        named = (batch.labels, batch.ids, batch.sources, y, x, flip, shift)
        small, images = [*named, *extra.values()], torch.from_numpy(batch.images)
        packet = _Packet(small) if self._streams else None
        for device in dict.fromkeys(self._devices):
            if packet is None or device.type == "cpu":
                pixels, others = images, [torch.from_numpy(array) for array in small]
            else:
                stream = self._streams[device]
                with torch.cuda.stream(stream):
                    pixels, others = images.to(device, non_blocking=True), packet.copy_to(device)
                    item.copied[device] = stream.record_event()
            fields, more = others[: len(named)], dict(zip(extra, others[len(named) :], strict=True))
            item.tensors[device] = TensorBatch._make([pixels, *fields, batch.epoch, batch.start, more, ()])
        self._issued.append(item)

    def _settle(self, item: _Copy) -> None:
        """Make the consumer's streams wait for a batch's copies, and keep its slot until they are done."""
        for device, copied in item.copied.items():
            consumer = torch.cuda.current_stream(device)
            consumer.wait_event(copied)
            batch = item.tensors[device]
            # Allocated on the side stream: without this, freeing them would let that stream overwrite them in use. The
            # tensors of a packet share the memory of the first.
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(consumer)
        if item.copied:
            self._copying.append(_Copy({}, item.source, {}, item.copied))  # without the tensors, which the caller owns

    def _return_slots(self) -> None:
        """Let go of the slots whose copies are done; next() does not wait for the others."""
        while self._copying and self._copying[0].is_done:
            self._copying.popleft()

    def _wait_for_copies(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._copying.clear()


class _Packet:
    """Small arrays, one after the other in one block of pinned memory, so that one copy moves them all."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._parts: list[tuple[int, Tensor]] = []  # first byte, and the host's tensor, of which shape and dtype count
        size = 0
        for array in arrays:
            self._parts.append((size, torch.from_numpy(np.ascontiguousarray(array))))
            size += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        # Torch keeps freed pinned blocks, and reuses one only when the copies from it are done.
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for mine, (_, given) in zip(self._views(self._host), self._parts, strict=True):
            mine.copy_(given)

    def copy_to(self, device: torch.device) -> list[Tensor]:
        """Start a copy to ``device`` on the current stream; return the arrays as tensors, views of one block."""
        return self._views(self._host.to(device, non_blocking=True))

    def _views(self, block: Tensor) -> list[Tensor]:
        return [block[start : start + like.nbytes].view(like.dtype).view(like.shape) for start, like in self._parts]


def _checked(device: str | torch.device | Sequence[str | torch.device]) -> tuple[torch.device, ...]:
    """Return the devices asked for, one or more; raise OptionError if one is missing."""
    devices = []
    for each in [device] if isinstance(device, (str, torch.device)) else device:
        try:
            found = torch.device(each)
        except RuntimeError as error:
            raise OptionError("device", each, "cpu or a CUDA device such as cuda:0") from error
        if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
            raise OptionError("device", str(each), "cpu, or cuda where PyTorch finds a GPU")
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        devices.append(found)
    if not devices:
        raise OptionError("device", device, "at least one device")
    return tuple(devices)


def _pin(memory: npt.NDArray[np.uint8], device: torch.device) -> int:
    """Register the slots as page-locked memory, from which copies are asynchronous; return its address."""
    address = int(memory.ctypes.data)
    with torch.cuda.device(device):  # the call makes a context on the current device, which need not be in use
        code = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE)
    if int(code) != 0:
        raise PinnedMemoryError(memory.nbytes, int(code))
    return address


def _release(address: int | None, streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait for the streams, and unregister the memory that they copied from."""
    for stream in streams:
        stream.synchronize()
    if address is not None:
        # An error changes nothing any more: the memory is about to go, and its registration with it.
        torch.cuda.cudart().cudaHostUnregister(address)
