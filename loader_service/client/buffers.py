"""The slots of one loader: how they lie in their segment, and what a slice in them is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_service.client.actions import Ask, Batch, Part
from loader_service.errors import MessageError
from loader_service.types import DRAWS, SampleLayout, SliceId
from loader_service.wire.messages import Place
from loader_service.wire.shm import Hold, Segment

_ALIGNMENT_BYTES = 4096
Bytes = npt.NDArray[np.uint8]
Copy = Callable[[Bytes, Bytes], None]


class Buffers:
    """Slots for batches of up to ``batch_size`` samples.

    A slot is three areas, each from a page boundary: pixels, labels, draws. A slice is a run of samples in each.

    Args:
        layout: of one sample.
        seed: of the run.
        batch_size: samples per slot.
        slots: how many.
        slice_samples: most samples per slice, which says how many parts a slot has.
        named: whether other processes shall be able to open it.
        copy: (to, from): a frame's bytes to their slot.

    Raises:
        SharedMemoryError: there is not enough memory.
    """

    def __init__(
        self,
        layout: SampleLayout,
        seed: int,
        batch_size: int,
        *,
        slots: int,
        slice_samples: int,
        named: bool,
        copy: Copy,
    ) -> None:
        self._copy = copy
        self.layout, self.slots, self.slice_samples = layout, slots, slice_samples
        self._seed, self._batch_size = seed, batch_size
        self._parts = -(-batch_size // slice_samples)
        self._labels = _round_up(batch_size * layout.image_bytes)
        self._draws = self._labels + _round_up(batch_size * 8)
        self._slot_bytes = self._draws + _round_up(batch_size * layout.draws_bytes)
        self.segment = Segment.create(slots * self._slot_bytes, slots * self._parts, named=named)

    @property
    def memory_bytes(self) -> int:
        """What all slots take together: the loader's memory ceiling."""
        return self.segment.size

    @property
    def memory(self) -> Bytes:
        """The slots' bytes as one array."""
        segment = self.segment
        return segment.array(segment.data_offset, (segment.size - segment.data_offset,), np.uint8)

    def arm(self, slot: int, part: int) -> int | None:
        """See :meth:`Segment.arm`."""
        return self.segment.arm(slot * self._parts + part)

    def slice_id(self, epoch: int, part: Part) -> SliceId:
        """The identity of a slice of this run."""
        return SliceId(self.layout.view, self._seed, epoch, part.first, part.count, part.excluded)

    def place(self, ask: Ask) -> Place:
        """Where a worker shall write."""
        base, layout, offset = self._base(ask.batch.slot), self.layout, ask.part.offset
        return Place(
            part=ask.batch.slot * self._parts + ask.part.index,
            generation=ask.generation,
            images=base + offset * layout.image_bytes,
            labels=base + self._labels + offset * 8,
            draws=base + self._draws + offset * layout.draws_bytes,
        )

    def write_pixels(self, batch: Batch, part: Part, start: int, frame: Bytes) -> None:
        """A piece of a slice from another machine, frame to slot: the one copy that it takes.

        Raises:
            MessageError: it does not go on where the last one ended, or beyond the slice.
        """
        images, _, _ = self._areas(batch, part)
        end = part.received + frame.size
        if start != part.received or end > images.size:
            raise MessageError(f"{frame.size} bytes at {start} are not what a slice goes on with")
        self._copy(images[start:end], frame)
        part.received = end

    def write_tail(self, batch: Batch, part: Part, frame: Bytes) -> None:
        """The end of a slice in frames: its labels and draws.

        Raises:
            MessageError: pixels are missing, or the frame has another size.
        """
        images, labels, draws = self._areas(batch, part)
        if part.received != images.size or frame.size != labels.size + draws.size:
            raise MessageError(f"a slice's {part.received} and {frame.size} bytes are not its size")
        np.copyto(labels, frame[: labels.size])
        np.copyto(draws, frame[labels.size :])

    def arrays(
        self, slot: int, count: int, release: Callable[[int], None]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.void]]:
        """A finished batch's arrays; ``release(slot)`` is called when the last of them is gone.

        Returns:
            Pixels (count, *view.shape) uint8, float16 or float32; labels (count,) int64; draws (count, *view.draws_shape) DRAWS.
        """
        layout = self.layout
        hold = Hold(self.segment.array(self._base(slot), (self._slot_bytes,), np.uint8), partial(release, slot))
        whole = np.asarray(hold)
        return (
            np.ndarray((count, *layout.view.shape), layout.dtype, whole, 0),
            np.ndarray((count,), np.int64, whole, self._labels),
            np.ndarray((count, *layout.view.draws_shape), DRAWS, whole, self._draws),
        )

    def close(self) -> None:
        """Take the segment's name away and let go of it; arrays that are out stay valid."""
        self.segment.unlink()
        self.segment.close()

    def _areas(self, batch: Batch, part: Part) -> tuple[Bytes, Bytes, Bytes]:
        """A slice's bytes: pixels, labels, draws."""
        base, layout, offset, count = self._base(batch.slot), self.layout, part.offset, part.count
        areas = ((0, layout.image_bytes), (self._labels, 8), (self._draws, layout.draws_bytes))
        images, labels, draws = (
            self.segment.array(base + area + offset * size, (count * size,), np.uint8) for area, size in areas
        )
        return images, labels, draws

    def _base(self, slot: int) -> int:
        return self.segment.data_offset + slot * self._slot_bytes


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
