"""A wrapper around a Loader for PyTorch training loops: batches as tensors, on one device or several.

>>> from loader_service import Loader
>>> from loader_service.torch import TensorLoader
>>> with Loader() as loader, TensorLoader(loader, "cuda:0", layout="nchw", mean="image", fields=("images", "labels")) as batches:  # doctest: +SKIP
...     for epoch in range(90):
...         for images, labels in batches:
...             train(images, labels)

On the CPU a tensor is a view of the loader's slot, without a copy. For GPUs the slots are registered as pinned memory, and
each batch travels on a side stream while the one before it trains, in two copies: the pixels straight from their slot, and
everything else in one packet. A slot is returned when the copies from it have finished.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from loader_service.client.epochs import Books, Epochs, Item, Step, Turn
from loader_service.client.loader import Batch, Loader
from loader_service.errors import LoaderClosed, LoaderServiceError, OptionError, PinnedMemoryError
from loader_service.types import EpochAccount

_PORTABLE: Final = 1
"""cudaHostRegisterPortable: the memory is pinned for every GPU, not only for the current one."""

_ALIGNMENT_BYTES: Final = 16
"""Alignment of the arrays in a packet: a multiple of every element's size, which torch needs to view bytes as elements."""

Layout = Literal["nhwc", "nchw", "channels_last"]
"""Order of the axes of images: ``nhwc`` (B, [V,] side, side, 3) as they lie in memory; ``nchw`` (B, [V,] 3, side, side),
contiguous; ``channels_last`` the same shape, as a view of the memory of ``nhwc``, which costs nothing."""

Array = npt.NDArray[Any]
Extra = Callable[[Batch], Mapping[str, Array]]


class TensorBatch(NamedTuple):
    """A batch of B samples as tensors on one device; with a ten-crop view, V = 10 images per sample.

    Fields:
        images: RGB, in the TensorLoader's layout and dtype; by default (B, [V,] side, side, 3) of the loader's dtype.
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

    def __repr__(self) -> str:
        """Return shapes, dtypes and the device, not the pixels."""
        tensors = (f"{name}={_brief(getattr(self, name))}" for name in self._fields[:8])
        extra = "".join(f", extra[{name!r}]={_brief(tensor)}" for name, tensor in self.extra.items())
        copies = "".join(f", copy on {each.images.device}" for each in self.copies)
        return f"TensorBatch({', '.join(tensors)}, epoch={self.epoch}, start={self.start}{extra}, on {self.images.device}{copies})"  # fmt: skip


def _brief(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@dataclass(eq=False)
class _Copy:
    """A batch whose copies to the devices are issued, with the host arrays that must live until they are done."""

    tensors: dict[torch.device, TensorBatch]
    number: int  # of the loader's offer
    source: Batch
    after: Books  # the loader's, just after this batch
    copied: dict[torch.device, torch.cuda.Event]  # empty on the CPU, where nothing is copied

    @property
    def is_done(self) -> bool:
        return all(event.query() for event in self.copied.values())


_users: weakref.WeakKeyDictionary[Loader, weakref.ref[TensorLoader[Any]]] = weakref.WeakKeyDictionary()
"""The open TensorLoader of each Loader."""


class TensorLoader(Epochs[Item, _Copy, deque[_Copy]]):
    """A source of a loader's batches as tensors on a device; its loops are a Loader's: one ``for`` is one epoch.

    Save its ``state_dict``, not the loader's, which is ahead by the batches that are being copied; likewise for ``ledger``.

    Args:
        loader: an open Loader without another open TensorLoader; the caller closes it, after this.
        device: device of the tensors; or several, each of which gets every batch (see ``TensorBatch.copies``). A device
            that occurs twice gets one copy.
        extra: called once for each Batch, in order, at the latest when it is returned and on a GPU up to one batch earlier;
            once more for the same Batch if an exception, such as KeyboardInterrupt, comes between. The arrays that it returns,
            such as random masks, travel in the batch's packet and come back as ``TensorBatch.extra``, with the same names,
            shapes and dtypes.
        layout: order of the images' axes, see :data:`Layout`.
        dtype: of the images, such as ``float16`` or ``torch.bfloat16``; None is the loader's, or float32 with mean or std.
        mean: subtracted from the images, in grey levels 0 to 255: ``image`` is each crop's window of the dataset's mean
            image, ``channels`` the dataset's channel means; or three numbers.
        std: three numbers by which the images are divided then, in grey levels.
        fields: names of fields of TensorBatch; each batch is then a plain tuple of these.

    Layout, dtype, mean and std are applied on each device, on the side stream: pixels travel as uint8.

    Fields:
        device: the first device.

    Raises:
        OptionError: PyTorch has no such device, or the loader has an open TensorLoader. Two of them would share the batches
            out between each other, and neither could say where the epoch stands. Or another argument cannot work.
        PinnedMemoryError: CUDA cannot register the slots.
    """

    @overload
    def __init__(
        self: TensorLoader[TensorBatch],
        loader: Loader,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        extra: Extra | None = None,
        layout: Layout = "nhwc",
        dtype: str | torch.dtype | None = None,
        mean: Literal["image", "channels"] | Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fields: None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: TensorLoader[tuple[Any, ...]],
        loader: Loader,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        extra: Extra | None = None,
        layout: Layout = "nhwc",
        dtype: str | torch.dtype | None = None,
        mean: Literal["image", "channels"] | Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fields: Sequence[str],
    ) -> None: ...

    def __init__(
        self,
        loader: Loader,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        extra: Extra | None = None,
        layout: Layout = "nhwc",
        dtype: str | torch.dtype | None = None,
        mean: Literal["image", "channels"] | Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fields: Sequence[str] | None = None,
    ) -> None:
        self._devices = _checked(device)
        self.device = self._devices[0]
        self._fields = _checked_fields(fields, self._devices)
        self._pixels = _Pixels(loader, layout, dtype, mean, std)
        user = _users.get(loader)
        if user is not None and user() is not None:
            raise OptionError("loader", loader, "a Loader without another open TensorLoader: close that one first")
        super().__init__(loader._schedule, loader._books)
        self._loader, self._extra = loader, extra
        self._loaders_turn = Turn(None)
        self._copying: deque[_Copy] = deque()  # handed out; their slots wait for their copies
        self._streams = {each: torch.cuda.Stream(each) for each in dict.fromkeys(self._devices) if each.type == "cuda"}
        address = _pin(loader.memory, next(iter(self._streams))) if self._streams else None
        self._pinned = address, list(self._streams.values())
        # A finaliser also unregisters the memory of a TensorLoader that is dropped without close().
        self._release: weakref.finalize[..., TensorLoader[Item]] = weakref.finalize(self, _release, *self._pinned)
        _users[loader] = weakref.ref(self)

    @property
    def ledger(self) -> list[EpochAccount]:
        """The account of each epoch begun, of the batches that this TensorLoader has returned; see :class:`EpochAccount`."""
        return self._loader._ledger(self._books)

    def state_dict(self) -> dict[str, Any]:
        """Return the first position that was not returned here; see :meth:`Loader.state_dict`."""
        return self._loader._state(self._books).plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place; see :meth:`Loader.load_state_dict`."""
        self._loader.load_state_dict(state)
        self._turn = None
        self._set(self._loader._books)

    def close(self) -> None:
        """Wait for copies in progress and unregister the loader's memory; tensors that were returned stay valid."""
        if self._release.alive:
            self._wait_for_copies()
            self._set(self._books)
            self._offers.clear()
            _users.pop(self._loader, None)
            _release(*self._pinned)
            self._release.detach()  # last: an interrupted close() can be called again

    def __enter__(self) -> TensorLoader[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # The parts of Epochs. A lane is a queue of batches that are being copied, at most two.

    def _check(self) -> None:
        if not self._release.alive:
            raise LoaderClosed("TensorLoader")
        self._loader._check()

    def _begin(self, books: Books) -> deque[_Copy]:
        self._wait_for_copies()  # of batches that are dropped
        self._loader._adopt(books)
        # From now on this is the loader's newest iterator: a loop over the loader itself replaces it.
        self._loaders_turn = self._loader._turn = Turn(None)
        return deque()

    def _fetch(self, lane: deque[_Copy]) -> tuple[_Copy, Item, Books]:
        self._return_slots()
        if lane:  # an interrupt may have come between the two steps that take the loader's offer, see _issue
            self._loader._offers.pop(lane[-1].number, None)
        else:
            if not self._loader.ready:
                self._wait_for_copies()  # the loader may be waiting for just these slots
            self._issue(lane)
        # On a GPU the next batch is copied while this one trains, if it is ready: this one does not wait for it.
        if self._streams and len(lane) == 1 and self._loader.ready:
            with suppress(StopIteration, LoaderServiceError):  # the loader raises them again at the next call
                self._issue(lane)
        copy = lane[0]
        self._settle(copy)
        first, *others = (copy.tensors[device] for device in self._devices)
        batch = first._replace(copies=tuple(others))
        item = tuple(getattr(batch, name) for name in self._fields) if self._fields else batch
        return copy, cast("Item", item), copy.after

    def _drop(self, lane: deque[_Copy], source: _Copy) -> None:
        if lane and lane[0] is source:
            if source.copied:
                # Without the tensors, which the caller owns.
                self._copying.append(_Copy({}, source.number, source.source, source.after, source.copied))
            lane.popleft()

    def _hand_over(self, step: Step[_Copy, deque[_Copy]]) -> None:
        """Do nothing: the offer is complete."""

    def _excluded_now(self) -> tuple[int, ...]:
        return self._loader._excluded_now()

    # Copies

    def _issue(self, lane: deque[_Copy]) -> None:
        """Start copying the loader's next batch to the devices; for the CPU, take views of it."""
        number = self._loader._offer(self._loaders_turn)
        lane.append(self._copy(number))
        self._loader._offers.pop(number)

    def _copy(self, number: int) -> _Copy:
        batch = self._loader._offers[number]
        copy = _Copy({}, number, batch, self._loader._step.after, {})
        extra = self._extra(batch) if self._extra else {}
        # A struct's fields have strides that no tensor can have, so they are copied: a few bytes per sample.
        y, x, flip, shift = (np.ascontiguousarray(batch.draws[name]) for name in ("y", "x", "flip", "shift"))
        y, x = y.astype(np.int64), x.astype(np.int64)  # they serve as indices
        named = (batch.labels, batch.ids, batch.sources, y, x, flip, shift)
        small, images = [*named, *extra.values()], torch.from_numpy(batch.images)
        packet = _Packet(small) if self._streams else None
        for device in dict.fromkeys(self._devices):
            if packet is None or device.type == "cpu":
                others = [torch.from_numpy(array) for array in small]
                pixels = self._pixels.of(images, *others[3:6])
            else:
                stream = self._streams[device]
                with torch.cuda.stream(stream):
                    images_there, others = images.to(device, non_blocking=True), packet.copy_to(device)
                    pixels = self._pixels.of(images_there, *others[3:6])
                    copy.copied[device] = stream.record_event()
            fields, more = others[: len(named)], dict(zip(extra, others[len(named) :], strict=True))
            copy.tensors[device] = TensorBatch._make([pixels, *fields, batch.epoch, batch.start, more, ()])
        return copy

    def _settle(self, copy: _Copy) -> None:
        """Make the consumer's streams wait for a batch's copies."""
        for device, copied in copy.copied.items():
            consumer = torch.cuda.current_stream(device)
            consumer.wait_event(copied)
            batch = copy.tensors[device]
            # Allocated on the side stream: without this, freeing them would let that stream overwrite them in use. The
            # tensors of a packet share the memory of the first.
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(consumer)

    def _return_slots(self) -> None:
        """Let go of the slots whose copies are done; next() does not wait for the others."""
        while self._copying and self._copying[0].is_done:
            self._copying.popleft()

    def _wait_for_copies(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._copying.clear()


class LookAhead(IterableDataset[Item]):
    """A TensorLoader for a framework that takes one batch more than its loop has, as Lightning and Accelerate do.

    Its state is the place after the batch that the loop was given, so that a checkpoint in the middle of an epoch leaves out
    nothing. One ``iter()`` is one epoch; after an ``iter()`` of which the loop was given nothing, the next has the same epoch.
    It is an IterableDataset, for ``DataLoader(LookAhead(batches), batch_size=None)``. It has no length and no set_epoch, on
    purpose: a framework would count steps with the one, and set back with the other, a run that goes on with other ranks.

    Args:
        batches: the TensorLoader to take batches from.
    """

    def __init__(self, batches: TensorLoader[Item]) -> None:
        self._batches = batches
        self._given = self._taken = batches.state_dict()  # after the loop's batch, and after the framework's
        self._at_first = False

    def __iter__(self) -> Iterator[Item]:
        if self._at_first:
            self._batches.load_state_dict(self._given)
        batches = iter(self._batches)  # goes to the next epoch, if the one before was left early
        self._given = self._taken = self._batches.state_dict()
        self._at_first = False
        return self._epoch(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the first position of which the loop was given no batch; see :meth:`Loader.state_dict`."""
        return self._given

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place; see :meth:`Loader.load_state_dict`."""
        self._batches.load_state_dict(state)
        self._given = self._taken = self._batches.state_dict()
        self._at_first = False

    def _epoch(self, batches: Iterator[Item]) -> Iterator[Item]:
        for number, batch in enumerate(batches):
            self._at_first = number == 0
            self._given, self._taken = self._taken, self._batches.state_dict()
            yield batch  # the loop has the batch before this one
        self._given, self._at_first = self._taken, False


class _Pixels:
    """The layout, dtype and normalisation of images, applied on their device.

    Raises:
        OptionError: an argument cannot work.
    """

    def __init__(
        self,
        loader: Loader,
        layout: str,
        dtype: str | torch.dtype | None,
        mean: str | Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        if layout not in get_args(Layout):
            raise OptionError("layout", layout, " or ".join(get_args(Layout)))
        if mean is not None and loader.dtype != "uint8":
            raise OptionError(
                "mean", mean, f"None with a Loader of {loader.dtype}, which has subtracted the mean image"
            )
        self._layout, self._dtype = (
            layout,
            _checked_dtype(dtype, loader.dtype, normalised=mean is not None or std is not None),
        )
        self._mean_image, self._mean = None, None
        if isinstance(mean, str) and mean == "image":
            self._mean_image = torch.from_numpy(np.array(loader.dataset.mean, np.float32))  # (side, side, 3)
        elif isinstance(mean, str) and mean == "channels":
            self._mean = _three("mean", loader.dataset.channel_means)
        elif mean is not None:
            self._mean = _three("mean", mean)
        self._std = None if std is None else _three("std", std)
        self._on: dict[torch.device, list[Tensor | None]] = {}

    def of(self, pixels: Tensor, y: Tensor, x: Tensor, flip: Tensor) -> Tensor:
        """Return images in their final form.

        Args:
            pixels: (B, [V,] side, side, 3) of the loader's dtype.
            y: (B, [V]) int64, first row of each crop in its record.
            x: (B, [V]) int64, its first column.
            flip: (B, [V]) bool.
        """
        if pixels.device not in self._on:
            constants = (self._mean_image, self._mean, self._std)
            self._on[pixels.device] = [None if each is None else each.to(pixels.device) for each in constants]
        image, mean, std = self._on[pixels.device]
        if image is not None or mean is not None or std is not None:
            pixels = pixels.to(torch.float32, copy=True)
            if image is not None:
                pixels -= _windows(image, y, x, flip, pixels.shape[-2])
            if mean is not None:
                pixels -= mean
            if std is not None:
                pixels /= std
        pixels = pixels.to(self._dtype)
        if self._layout == "nhwc":
            return pixels
        pixels = pixels.movedim(-1, -3)
        return pixels.contiguous() if self._layout == "nchw" else pixels


def _windows(image: Tensor, y: Tensor, x: Tensor, flip: Tensor, side: int) -> Tensor:
    """Return each crop's window of an image, mirrored as the crop is: (B, [V,] side, side, 3)."""
    steps = torch.arange(side, device=image.device)
    rows = y[..., None] + steps  # (B, [V,] side)
    columns = x[..., None] + torch.where(flip[..., None], side - 1 - steps, steps)
    return image[rows[..., :, None], columns[..., None, :]]


def _three(option: str, values: object) -> Tensor:
    """Return three numbers, one per channel, as (3,) float32."""
    with suppress(TypeError, ValueError):
        numbers = torch.tensor([float(value) for value in values])  # type: ignore[attr-defined]
        if len(numbers) == 3 and bool(torch.isfinite(numbers).all()) and (option == "mean" or bool(numbers.all())):
            return numbers
    kind = "'image', 'channels' or three numbers" if option == "mean" else "three numbers other than 0"
    raise OptionError(option, values, f"{kind} in grey levels, 0 to 255")


def _checked_dtype(dtype: str | torch.dtype | None, loaders: str, *, normalised: bool) -> torch.dtype:
    """Return the images' dtype; raise OptionError if pixels would not survive it."""
    chosen = dtype if dtype is not None else "float32" if normalised and loaders == "uint8" else loaders
    found = getattr(torch, chosen, None) if isinstance(chosen, str) else chosen
    whole = isinstance(found, torch.dtype) and found == torch.uint8 and loaders == "uint8" and not normalised
    if not (isinstance(found, torch.dtype) and (found.is_floating_point or whole)):
        raise OptionError("dtype", dtype, "float32, float16 or bfloat16, or uint8 for pixels that stay uint8")
    return found


def _checked_fields(fields: Sequence[str] | None, devices: Sequence[torch.device]) -> tuple[str, ...]:
    """Return the names of the fields asked for, none for whole batches."""
    if fields is None:
        return ()
    if isinstance(fields, str) or not fields or any(name not in TensorBatch._fields for name in fields):
        raise OptionError("fields", fields, f"a sequence of names out of {', '.join(TensorBatch._fields)}")
    if len(devices) > 1:
        raise OptionError("fields", fields, "None with several devices, whose batches are in `copies`")
    return tuple(fields)


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
