"""The node's own slots, for slices that go in frames: written by workers, sent by libzmq without a copy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

from loader_service.link.messages import Place, Request
from loader_service.link.slots import Hold, Segment
from loader_service.node.roster import Client, Task
from loader_service.spec import SampleLayout

ALIGNMENT_BYTES: Final = 64


class Outbox:
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
        self._freed: deque[tuple[int, Client, float]] = deque()

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

    def frames(self, task: Task) -> list[Any]:
        """A slice's two frames: pixels, and labels and draws one after the other. The slot is held until both are sent."""
        assert task.slot is not None
        (images, labels, draws), end = self._areas(task.request)
        layout, n = SampleLayout(task.request.what.view, task.request.dtype), task.request.what.count
        slot = self._segment.array(self._base(task.slot), (end,), np.uint8)
        whole = np.asarray(Hold(slot, partial(self._let_go, task.slot, task.client, time.monotonic())))
        tail = whole[labels : labels + 8 * n].tobytes() + whole[draws : draws + layout.draws_bytes * n].tobytes()
        return [whole[images : images + layout.image_bytes * n], tail]

    def freed(self) -> list[tuple[int, Client]]:
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

    def _let_go(self, slot: int, client: Client, since: float) -> None:
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
