"""The positions of each batch: pure arithmetic on (count, batch size, ranks), from any position on.

With W ranks the global batch has M = batch_size * W positions, fewer at the epoch's end, and rank r takes the positions
from start + floor(M r / W) to start + floor(M (r + 1) / W): every rank steps equally often, and together the ranks see
exactly the order that one rank would have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """A place in a run: an epoch, from 0, and a global position in its order."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Plan:
    """One rank's part of one global batch.

    Fields:
        epoch: the epoch, from 0.
        start, size: first position and number of positions of the global batch.
        first, count: this rank's part of it; count may be 0 in an epoch's last batch.
    """

    epoch: int
    start: int
    size: int
    first: int
    count: int

    @property
    def next(self) -> int:
        """The position after the global batch."""
        return self.start + self.size


@dataclass(frozen=True)
class Schedule:
    """The batches of a run, from any position on.

    Fields:
        records: positions in an epoch.
        batch_size: positions per rank and batch.
        rank, world_size: this rank, and the number of ranks.
        epochs: number of epochs; None for no end.
        drop_last: leave out an epoch's last batch if it is not full.
    """

    records: int
    batch_size: int
    rank: int
    world_size: int
    epochs: int | None
    drop_last: bool

    def batches(self, epoch: int, position: int) -> Iterator[Plan]:
        """Yield all batches from a global position of an epoch to the end of the last epoch."""
        for each in itertools.count(epoch) if self.epochs is None else range(epoch, self.epochs):
            yield from self._epoch(each, position if each == epoch else 0)  # epochs after the first are whole

    def batches_left(self, position: int) -> int:
        """Return the number of batches from a position of an epoch to its end."""
        # Full global batches, and the positions of a last one that is not full.
        full, rest = divmod(max(0, self.records - position), self.batch_size * self.world_size)
        return full + (1 if rest and not self.drop_last else 0)

    def expected(self, epoch_start: int = 0) -> int:
        """Return the number of positions that this rank takes, from a position of an epoch to its end."""
        return sum(plan.count for plan in self._ends(epoch_start))

    def settled(self, place: Place) -> Place:
        """Return the place of the next batch: the place itself, or the start of the next epoch if this one has no batch left."""
        return place if self.batches_left(place.position) else Place(place.epoch + 1, 0)

    def after(self, plan: Plan) -> Place:
        """Return the place after a batch; it is global, so another number of ranks can resume there."""
        return Place(plan.epoch, plan.next) if plan.next < self.records else Place(plan.epoch + 1, 0)

    def is_over(self, place: Place) -> bool:
        """Return True if a settled place is beyond the last epoch."""
        return self.epochs is not None and place.epoch >= self.epochs

    def _epoch(self, epoch: int, position: int) -> Iterator[Plan]:
        full = self.batch_size * self.world_size
        for index in range(self.batches_left(position)):
            yield self._plan(epoch, position + index * full)

    def _plan(self, epoch: int, start: int) -> Plan:
        size = min(self.batch_size * self.world_size, self.records - start)
        # floor(size r / W) cuts the batch without gaps into parts that differ by one position at most.
        low, high = (size * r // self.world_size for r in (self.rank, self.rank + 1))
        return Plan(epoch, start, size, start + low, high - low)

    def _ends(self, position: int) -> Iterator[Plan]:
        """Yield the rest of an epoch as two plans at most, so that a billion records cost no more than ten.

        The first plan stands for the sum of all full batches, the second for the batch that is not full.
        """
        full = self.batch_size * self.world_size
        batches = self.batches_left(position)
        whole = (self.records - position) // full if batches else 0
        # The epoch does not matter for a sum.
        yield Plan(0, position, whole * full, position, min(whole, batches) * self.batch_size)
        if batches > whole:
            yield self._plan(0, position + whole * full)
