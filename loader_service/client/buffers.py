"""The slots of one loader: their layout in the segment, the identity of a slice, and the arrays of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_service.client.delivery import Hold
from loader_service.client.protocol import Ask, Part, PendingBatch
from loader_service.types import DRAWS, SampleLayout, SliceId
from loader_service.wire.messages import Attach, Place, SlotLayout
from loader_service.wire.shm import Segment, sweep

_LABEL_BYTES = 8  # int64
Bytes = npt.NDArray[np.uint8]
Copy = Callable[[Bytes, Bytes], None]


class Buffers:
    """Slots for batches of up to ``batch_size`` samples.

    A slice is a range of samples in each of a slot's three areas; see :class:`SlotLayout`. A slot has as many parts as a
    full batch has slices.

    Args:
        layout: bytes of one sample.
        seed: the run's seed.
        batch_size: samples per slot.
        slots: number of slots.
        slice_samples: most samples per slice.
        named: True if other processes shall be able to open the memory.
        copy: copy(to, from) copies a frame's bytes to their slot.

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
        self.layout, self.slots, self._seed = layout, slots, seed
        # Slices of nearly equal size, and no more of them.
        self.slice_samples = -(-batch_size // -(-batch_size // slice_samples))  # ceil, twice
        at = SlotLayout(slots, batch_size, self.slice_samples, layout.image_bytes, layout.draws_bytes)
        self._at, self._slot_bytes = at, at.slot_bytes
        if named:
            sweep()  # segments of loaders that were killed, and whose node is gone: this one may need their room
        self.segment = Segment.create(slots * at.slot_bytes, at.parts, named=named)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all slots together: the loader's memory ceiling."""
        return self.segment.size

    @property
    def memory(self) -> Bytes:
        """The slots' bytes as one array (n,) uint8."""
        segment = self.segment
        return segment.array(segment.data_offset, (segment.size - segment.data_offset,), np.uint8)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one sample's pixels."""
        return self.layout.image_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of one sample's label and draws."""
        return _LABEL_BYTES + self.layout.draws_bytes

    @property
    def attach(self) -> Attach | None:
        """The message that asks a node to write into the segment; None if other processes cannot open it."""
        return Attach(self.segment.name, self.segment.nonce, self._at) if self.segment.name else None

    def arm(self, slot: int, part: int) -> int | None:
        """Give a part a new generation and return it; None while a late writer holds the part."""
        return self.segment.arm(slot * self._at.parts_per_slot + part)

    def slice_id(self, epoch: int, part: Part) -> SliceId:
        """Return the identity of a slice of this run."""
        return SliceId(self.layout.view, self._seed, epoch, part.first, part.count, part.excluded)

    def place(self, ask: Ask) -> Place:
        """Return the place in the segment that a worker shall write a slice to."""
        return Place(ask.batch.slot * self._at.parts_per_slot + ask.part.index, ask.generation)

    def write_pixels(self, batch: PendingBatch, part: Part, start: int, frame: Bytes) -> None:
        """Copy a piece of a slice from its frame to its slot, at byte ``start`` of the slice's pixels.

        This is the only copy that pixels take on their way from a node on another machine.
        """
        images, _, _ = self._areas(batch, part)
        # ClientProtocol._pixels has checked that the piece lies within the slice.
        self._copy(images[start : start + frame.size], frame)

    def write_tail(self, batch: PendingBatch, part: Part, frame: Bytes) -> None:
        """Copy the labels and draws of a slice, one after the other in their frame, to its slot."""
        _, labels, draws = self._areas(batch, part)
        # ClientProtocol._tail has checked the frame's size.
        np.copyto(labels, frame[: labels.size])
        np.copyto(draws, frame[labels.size :])

    def hold(self, slot: int) -> Hold:
        """Return a hold on a slot, for :meth:`arrays`."""
        return Hold(self.segment.array(self._base(slot), (self._slot_bytes,), np.uint8))

    def arrays(self, hold: Hold, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.void]]:
        """Return views of a finished batch, which keep its hold.

        Returns:
            Pixels (count, *view.shape) uint8, float16 or float32; labels (count,) int64; draws (count, *view.draws_shape) DRAWS.
        """
        layout = self.layout
        whole = np.asarray(hold)  # (slot_bytes,) uint8, whose base is the hold
        return (
            # Slots and areas begin on page boundaries, so each array is aligned for its dtype.
            np.ndarray((count, *layout.view.shape), layout.dtype, whole, 0),
            np.ndarray((count,), np.int64, whole, self._at.labels),
            np.ndarray((count, *layout.view.draws_shape), DRAWS, whole, self._at.draws),
        )

    def close(self) -> None:
        """Remove the segment's name and close it; arrays in the caller's hands stay valid."""
        self.segment.unlink()
        self.segment.close()

    def _areas(self, batch: PendingBatch, part: Part) -> tuple[Bytes, Bytes, Bytes]:
        """Return the bytes of a slice in its slot: pixels, labels, draws."""
        base, layout, offset, count = self._base(batch.slot), self.layout, part.offset, part.count
        areas = ((0, layout.image_bytes), (self._at.labels, _LABEL_BYTES), (self._at.draws, layout.draws_bytes))
        images, labels, draws = (
            self.segment.array(base + area + offset * size, (count * size,), np.uint8) for area, size in areas
        )
        return images, labels, draws  # flat, (count * bytes of a sample,) uint8 each

    def _base(self, slot: int) -> int:
        return self.segment.data_offset + slot * self._slot_bytes
