"""Send buffers: the node's own slots for slices in frames. Workers write them, and libzmq sends them without a copy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np

from loader_service.node.packets import Destination
from loader_service.node.scheduler import ClientRecord, Task
from loader_service.types import SampleLayout
from loader_service.wire.messages import Filled, Pixels, Request, encode
from loader_service.wire.shm import Hold, Segment

ALIGNMENT_BYTES: Final = 64
"""Alignment of each array in a slot: a cache line, and the widest vector register (AVX-512)."""

PIECE_BYTES: Final = 2 * 2**20
"""Upper bound of the pixels in one frame, in bytes. The client copies a frame of this size out of the second-level cache,
and libzmq receives it into memory that was used before; neither holds for one frame of 19 MB."""


def messages_per_slice(slot_bytes: int) -> int:
    """Return the most messages that a slice is sent in: pieces of its pixels, and the end."""
    return -(-slot_bytes // PIECE_BYTES) + 1


class SendBuffers:
    """The send slots of one node.

    Args:
        segment: their memory, which the workers inherit.
        slot_bytes: size of a slot.
        wake: function that wakes the dispatcher's loop; called in a thread of pyzmq when libzmq releases a slot.
    """

    def __init__(self, segment: Segment, slot_bytes: int, wake: Callable[[], None]) -> None:
        self.slot_bytes = slot_bytes
        self.send_s = 0.0
        """Seconds from handing a slice to libzmq to the release of its slot, summed over slices."""
        self._segment, self._wake = segment, wake
        self._freed: deque[tuple[int, ClientRecord, float]] = deque()

    @property
    def segment_name(self) -> str:
        """The name of this segment in a lease."""
        return self._segment.name

    def fits(self, request: Request) -> bool:
        """Return whether the slice of a request fits into a slot."""
        _, end = self._areas(request)
        return end <= self.slot_bytes

    def destination(self, task: Task) -> Destination | None:
        """Arm a task's slot and return the destination of its slice; None if a late writer holds the slot."""
        assert task.slot is not None
        generation = self._segment.arm(task.slot)  # again for each lease, so a dead worker's lease is void
        if generation is None:
            return None
        (images, labels, draws), _ = self._areas(task.request)
        base = self._base(task.slot)
        return Destination(task.slot, generation, base + images, base + labels, base + draws)

    def messages(self, task: Task) -> Iterator[list[Any]]:
        """Yield the messages of a slice, each a list of frames. They hold the slot until the last of them is sent."""
        assert task.slot is not None
        (_, labels, draws), end = self._areas(task.request)
        layout, request, n = (
            SampleLayout(task.request.what.view, task.request.dtype),
            task.request,
            task.request.what.count,
        )
        # Frames are views of this array, so libzmq sends from the slot, and the last freed frame releases the slot.
        slot = self._segment.array(self._base(task.slot), (end,), np.uint8)
        # (end,) uint8, whose base is the hold.
        whole = np.asarray(Hold(slot, partial(self._release, task.slot, task.client, time.monotonic())))
        size = layout.image_bytes * n  # bytes of pixels
        for start in range(0, size, PIECE_BYTES):
            yield [encode(Pixels(request.id, start)), whole[start : min(start + PIECE_BYTES, size)]]
        # Labels and draws are small (20 bytes a sample), so one copy of both is cheaper than two frames.
        tail = whole[labels : labels + 8 * n].tobytes() + whole[draws : draws + layout.draws_bytes * n].tobytes()
        yield [encode(Filled(request.id)), tail]

    def freed(self) -> list[tuple[int, ClientRecord]]:
        """Return the slots that libzmq has released since the last call, with their clients."""
        slots = []
        while self._freed:  # pyzmq's thread appends meanwhile; both operations are atomic
            slot, client, since = self._freed.popleft()
            self.send_s += time.monotonic() - since
            slots.append((slot, client))
        return slots

    def close(self) -> None:
        """Close the segment; frames that libzmq still holds stay valid."""
        self._segment.close()

    def _release(self, slot: int, client: ClientRecord, since: float) -> None:
        # Runs in pyzmq's thread, or in the dispatcher's if libzmq got no frame by reference. A deque's append is atomic;
        # everything else waits for the dispatcher's loop.
        self._freed.append((slot, client, since))
        self._wake()

    def _base(self, slot: int) -> int:
        return self._segment.data_offset + slot * self.slot_bytes

    def _areas(self, request: Request) -> tuple[tuple[int, int, int], int]:
        """Return the aligned offsets of pixels, labels and draws in a slot, and the end of the draws, all in bytes."""
        layout, n = SampleLayout(request.what.view, request.dtype), request.what.count
        labels = _align(layout.image_bytes * n)
        draws = _align(labels + 8 * n)
        return (0, labels, draws), draws + layout.draws_bytes * n


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # ceil
