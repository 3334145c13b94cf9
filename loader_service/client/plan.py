"""Which positions go into which batch: pure arithmetic on (count, batch size, ranks), for any place to start from.

With W ranks the global batch has M = batch_size * W positions, fewer at the epoch's end, and rank r takes the positions
from start + floor(M r / W) to start + floor(M (r + 1) / W): every rank steps equally often, and together the ranks see
exactly the order that one rank would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One rank's part of one global batch.

    Fields:
        epoch: which epoch.
        start, size: the global batch: its first position and how many it has.
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
    """The batches of a run, from anywhere.

    Fields:
        records: positions in an epoch.
        batch_size: positions per rank and batch.
        rank, world_size: which rank this is, of how many.
        epochs: how many epochs there are, numbered from 0.
        drop_last: leave out an epoch's last batch if it is not full.
    """

    records: int
    batch_size: int
    rank: int
    world_size: int
    epochs: int
    drop_last: bool

    def batches(self, epoch: int, position: int) -> Iterator[Plan]:
        """All batches from a global position of an epoch to the end of the last one."""
        for each in range(epoch, self.epochs):
            yield from self._epoch(each, position if each == epoch else 0)

    def batches_left(self, position: int) -> int:
        """How many batches an epoch has from a position to its end."""
        full, rest = divmod(max(0, self.records - position), self.batch_size * self.world_size)
        return full + (1 if rest and not self.drop_last else 0)

    def expected(self, epoch_start: int = 0) -> int:
        """How many positions of an epoch this rank takes, from a position to the epoch's end."""
        return sum(plan.count for plan in self._ends(epoch_start))

    def _epoch(self, epoch: int, position: int) -> Iterator[Plan]:
        full = self.batch_size * self.world_size
        for index in range(self.batches_left(position)):
            yield self._plan(epoch, position + index * full)

    def _plan(self, epoch: int, start: int) -> Plan:
        size = min(self.batch_size * self.world_size, self.records - start)
        low, high = (size * r // self.world_size for r in (self.rank, self.rank + 1))
        return Plan(epoch, start, size, start + low, high - low)

    def _ends(self, position: int) -> Iterator[Plan]:
        """The epoch as two plans in one: its full batches stand for their sum. Grows with nothing."""
        full = self.batch_size * self.world_size
        batches = self.batches_left(position)
        whole = (self.records - position) // full if batches else 0
        yield Plan(0, position, whole * full, position, min(whole, batches) * self.batch_size)
        if batches > whole:
            yield self._plan(0, position + whole * full)
