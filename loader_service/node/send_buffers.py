"""The node's own slots, for slices that go in frames: written by workers, sent by libzmq without a copy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np

from loader_service.node.scheduler import ClientRecord, Task
from loader_service.types import SampleLayout
from loader_service.wire.messages import Filled, Pixels, Place, Request, encode
from loader_service.wire.shm import Hold, Segment

ALIGNMENT_BYTES: Final = 64

PIECE_BYTES: Final = 2 * 2**20
"""Most pixels in one message. What comes in is copied on while it lies in the second-level cache, and the memory that
libzmq receives it into has been used before; a frame of 19 MB is neither."""


class SendBuffers:
    """The send slots of one node.

    Args:
        segment: their memory, which the workers have inherited.
        slot_bytes: of each.
        wake: called, from whichever thread it happens in, when libzmq has let go of a slot.
    """

    def __init__(self, segment: Segment, slot_bytes: int, wake: Callable[[], None]) -> None:
        self.slot_bytes = slot_bytes
        self.send_s = 0.0
        """Seconds that slices have spent on their way out, added up."""
        self._segment, self._wake = segment, wake
        self._freed: deque[tuple[int, ClientRecord, float]] = deque()

    @property
    def segment_name(self) -> str:
        """What a lease calls this segment."""
        return self._segment.name

    def fits(self, request: Request) -> bool:
        """Whether a request's slice fits a slot."""
        _, end = self._areas(request)
        return end <= self.slot_bytes

    def place(self, task: Task) -> Place | None:
        """Where in its slot a slice is to be written, under a new generation; None if somebody still writes there."""
        assert task.slot is not None
        generation = self._segment.arm(task.slot)
        if generation is None:
            return None
        (images, labels, draws), _ = self._areas(task.request)
        base = self._base(task.slot)
        return Place(task.slot, generation, base + images, base + labels, base + draws)

    def messages(self, task: Task) -> Iterator[list[Any]]:
        """A slice's messages, each a list of frames; its slot is held until the last of them is sent."""
        assert task.slot is not None
        (_, labels, draws), end = self._areas(task.request)
        layout, request, n = (
            SampleLayout(task.request.what.view, task.request.dtype),
            task.request,
            task.request.what.count,
        )
        slot = self._segment.array(self._base(task.slot), (end,), np.uint8)
        whole = np.asarray(Hold(slot, partial(self._let_go, task.slot, task.client, time.monotonic())))
        size = layout.image_bytes * n
        for start in range(0, size, PIECE_BYTES):
            yield [encode(Pixels(request.id, start)), whole[start : min(start + PIECE_BYTES, size)]]
        tail = whole[labels : labels + 8 * n].tobytes() + whole[draws : draws + layout.draws_bytes * n].tobytes()
        yield [encode(Filled(request.id)), tail]

    def freed(self) -> list[tuple[int, ClientRecord]]:
        """The slots that have been let go of since the last call, and whose they were."""
        slots = []
        while self._freed:
            slot, client, since = self._freed.popleft()
            self.send_s += time.monotonic() - since
            slots.append((slot, client))
        return slots

    def close(self) -> None:
        """Let go of the memory; what libzmq still holds stays valid."""
        self._segment.close()

    def _let_go(self, slot: int, client: ClientRecord, since: float) -> None:
        self._freed.append((slot, client, since))
        self._wake()

    def _base(self, slot: int) -> int:
        return self._segment.data_offset + slot * self.slot_bytes

    def _areas(self, request: Request) -> tuple[tuple[int, int, int], int]:
        """Offsets of pixels, labels and draws within a slot, each aligned; and the end of them."""
        layout, n = SampleLayout(request.what.view, request.dtype), request.what.count
        labels = _align(layout.image_bytes * n)
        draws = _align(labels + 8 * n)
        return (0, labels, draws), draws + layout.draws_bytes * n


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
