"""The client's account: which slices are asked for, of whom, since when; which have come; what is delivered.

Rules of this file: no sockets, clocks, threads or shared memory. Events come in as method calls, actions come out of
:meth:`Ledger.advance`. The one thing it must know from outside at once, whether a slot's part is free of late writers,
it asks through ``arm`` (see ``wire.shm``).

A batch lives in a slot and is made of parts, one slice each. A part's life:

    wanted --ask--> asked --filled, by the very request that is current--> done
       ^              |
       +--------------+  its node is lost, stands still, or says that it could not

Each ask has a number of its own, never used again; an answer to any other number than the part's current one is a
duplicate and refused. Batches are delivered in the schedule's order and each once, since a part is done once.
A slot whose part cannot be armed is condemned until it can: the batch moves to a free slot, else to that of a younger
batch that has nothing under way, else it waits for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

from loader_service.client.actions import Action, Ask, Batch, Deliver, Finish, Part, Standstill
from loader_service.client.plan import Plan, Schedule
from loader_service.client.pool import Node, Pool
from loader_service.types import EpochAccount

Arm = Callable[[int, int], int | None]
"""(slot, part) -> the part's new generation, or None while a late writer holds it."""

ASKS_PER_WORKER: Final = 3
"""Slices asked of a node at a time, per worker: one in work, one waiting at the worker, one at the dispatcher."""

NO_SLOT: Final = -1

MAX_EXCUSES: Final = 20
"""How often a part may be refused for no record's fault before the run is called broken."""


Asked = tuple[Batch, Part]
"""What an ask was for."""


class Ledger:
    """The account of one run of a loader.

    Args:
        schedule: which batches there are.
        epoch, position: where to begin.
        slots: the slots that are free.
        slice_samples: most positions per slice.
        arm: see above.
        numbers: gives each ask its number; shared by all ledgers of a client, so that no number is used twice.
        patience_s: how long a node may owe slices and give nothing.
        excluded: records that are known to be bad, ascending.
    """

    def __init__(
        self,
        schedule: Schedule,
        epoch: int,
        position: int,
        *,
        slots: list[int],
        slice_samples: int,
        arm: Arm,
        numbers: Iterator[int],
        patience_s: float,
        excluded: tuple[int, ...] = (),
    ) -> None:
        self._schedule, self._arm, self._numbers = schedule, arm, numbers
        self._slice_samples = slice_samples
        self.excluded = excluded
        self._plans: Iterator[Plan] = schedule.batches(epoch, position)
        self._began = (epoch, position)
        self._exhausted = self._finished = False
        self._free = deque(slots)
        self._condemned: list[tuple[int, int]] = []  # slot, and how many parts it had
        self._batches: deque[Batch] = deque()  # in the order of delivery
        self._pool: Pool[Asked] = Pool(patience_s)
        self._accounts: dict[int, EpochAccount] = {}

    # Events

    def node_up(self, node: str, workers: int) -> None:
        """A node can be asked."""
        self._pool.add(node, workers * ASKS_PER_WORKER)

    def node_down(self, node: str) -> None:
        """A node is lost: what it was asked for is wanted again."""
        for batch, part in self._pool.remove(node):
            self._want_again(batch, part)

    def answering(self, node: str, number: int) -> Asked | None:
        """A node has begun to answer an ask, or goes on: the part that the ask is for, if it is still waited for."""
        self._pool.stir(node)
        return self._pool.owed(node, number)

    def filled(self, node: str, number: int) -> bool:
        """A node says that a slice is complete; False if it was a duplicate."""
        found = self._pool.settle(node, number)
        if found is None:
            self._count_duplicate()
            return False
        found[1].state = "done"
        return True

    def excused(self, node: str, number: int) -> bool:
        """A node could not make a slice, through no record's fault; False if nobody waits for it.

        The part is wanted again. True also says that it may be tried again; see :attr:`Part.excuses`.
        """
        found = self._pool.settle(node, number)
        if found is None:
            return False
        found[1].excuses += 1
        self._want_again(*found)
        return True

    def bad(self, node: str, number: int) -> bool:
        """A node calls a record of a slice bad; the part is wanted again.

        Returns:
            True if every node that can be asked has refused this part, so that the record is to be judged: excluded, or
            the end of the run. False if another node may still read it, or nobody waits for the answer.
        """
        found = self._pool.settle(node, number)
        if found is None:
            return False
        batch, part = found
        part.refused_by.add(node)
        self._want_again(batch, part)
        return part.refused_by >= self._pool.askable

    def exclude(self, record: int) -> None:
        """Ask for no slice with this record's pixels any more; slices that are under way may still have them."""
        self.excluded = tuple(sorted({*self.excluded, record}))
        for batch in self._batches:
            for part in batch.parts:
                part.refused_by.clear()

    def slot_returned(self, slot: int) -> None:
        """The caller has let go of a slot."""
        self._free.append(slot)

    # Actions

    def advance(self, now: float) -> list[Action]:
        """Everything that can be done now: retry condemned slots, open batches, ask for parts, deliver.

        Args:
            now: seconds on a clock that never goes back; to be called a few times a second, for it tells who stands still.
        """
        if self._condemned:
            self._pardon()
        self._place()
        self._open()
        actions: list[Action] = [*self._standstills(now), *self._asks(now), *self._deliveries()]
        if self._exhausted and not self._batches and not self._finished:
            self._finished = True
            actions.append(Finish())
        return actions

    @property
    def accounts(self) -> list[EpochAccount]:
        """The account of each epoch that was begun, in order; ``delivered`` is the caller's to count."""
        return [self._accounts[epoch] for epoch in sorted(self._accounts)]

    @property
    def waiting(self) -> int:
        """How many slices are asked for and have not come."""
        return self._pool.owing

    @property
    def open(self) -> int:
        """How many batches are in the making."""
        return len(self._batches)

    # Inside

    def _open(self) -> None:
        while self._free and not self._exhausted:
            plan = next(self._plans, None)
            if plan is None:
                self._exhausted = True
                return
            self._account(plan.epoch)
            self._batches.append(Batch(plan, self._free.popleft(), self._cut(plan)))

    def _cut(self, plan: Plan) -> list[Part]:
        """A batch in slices of nearly equal size."""
        pieces = -(-plan.count // self._slice_samples)
        edges = [plan.count * i // pieces for i in range(pieces + 1)] if pieces else []
        return [Part(plan.first + low, high - low, low, index) for index, (low, high) in enumerate(pairwise(edges))]

    def _standstills(self, now: float) -> Iterator[Standstill]:
        """Tell of nodes that stand still, and want what they owe of others, where there are any."""
        for node, still_s in self._pool.look(now):
            _, oldest = next(iter(node.asks.values()))
            yield Standstill(
                node.name,
                still_s,
                len(node.asks),
                oldest,
                now - oldest.asked_at,
                self._batches[0],
                self._pool.has_moving,
            )
        for batch, part in self._pool.reclaim():
            self._want_again(batch, part)

    def _asks(self, now: float) -> list[Ask]:
        asks: list[Ask] = []
        for batch in self._batches:
            if batch.slot != NO_SLOT and batch.wanting:
                if self._pool.full:
                    break
                asks += self._asks_of(batch, now)
        return asks

    def _asks_of(self, batch: Batch, now: float) -> list[Ask]:
        """Ask for the parts of a batch that are wanted; for none if its slot turns out to have a late writer."""
        asks: list[Ask] = []
        for part in batch.parts:
            if part.state != "wanted":
                continue
            node = self._choose(part.refused_by)
            if node is None:
                continue
            generation = self._arm(batch.slot, part.index)
            if generation is None:
                self._condemn(batch)
                return []
            part.state, part.ask, part.excluded, part.received = "asked", next(self._numbers), self.excluded, 0
            part.asked_at = now
            node.owe(part.ask, (batch, part), now)
            asks.append(Ask(node.name, part.ask, batch, part, generation))
        return asks

    def _choose(self, refused_by: set[str]) -> Node[Asked] | None:
        """The node to ask for a part, if one has room that has not refused it."""
        if refused_by >= self._pool.askable:
            refused_by.clear()  # those that might have read it have gone since: ask again, and judge again
        return self._pool.choose(refused_by)

    def _deliveries(self) -> Iterator[Deliver]:
        while self._batches and self._batches[0].done:
            yield Deliver(self._batches.popleft())

    def _want_again(self, batch: Batch, part: Part) -> None:
        part.state = "wanted"
        self._change(batch.plan.epoch, reassigned=1)

    def _condemn(self, batch: Batch) -> None:
        """Take a batch out of its slot, since a late writer holds a part of it; all its parts are made anew."""
        self._condemned.append((batch.slot, len(batch.parts)))
        self._pool.forget(lambda asked: asked[0] is batch)
        self._evict(batch)

    def _evict(self, batch: Batch) -> None:
        batch.slot = NO_SLOT
        for part in batch.parts:
            part.state = "wanted"

    def _place(self) -> None:
        """Find slots for batches that lost theirs, the next to be delivered first."""
        for index, batch in enumerate(self._batches):
            if batch.slot != NO_SLOT:
                continue
            if self._free:
                batch.slot = self._free.popleft()
                continue
            younger = list(self._batches)[index + 1 :]
            victim = next((b for b in reversed(younger) if b.slot != NO_SLOT and not b.asked), None)
            if victim is None:
                return
            batch.slot = victim.slot
            self._evict(victim)

    def _pardon(self) -> None:
        """Take condemned slots back whose late writers are gone."""
        still = []
        for slot, parts in self._condemned:
            if all(self._arm(slot, index) is not None for index in range(parts)):
                self._free.append(slot)
            else:
                still.append((slot, parts))
        self._condemned = still

    def _account(self, epoch: int) -> None:
        if epoch not in self._accounts:
            start = self._began[1] if epoch == self._began[0] else 0
            self._accounts[epoch] = EpochAccount(epoch, self._schedule.expected(start))

    def _count_duplicate(self) -> None:
        if self._accounts:
            self._change(max(self._accounts), duplicates_refused=1)

    def _change(self, epoch: int, duplicates_refused: int = 0, reassigned: int = 0) -> None:
        old = self._accounts[epoch]
        self._accounts[epoch] = EpochAccount(
            epoch,
            old.expected,
            duplicates_refused=old.duplicates_refused + duplicates_refused,
            reassigned=old.reassigned + reassigned,
        )
