"""The client's account: which slices are asked for, of whom, since when; which have come; what is delivered.

Rules of this file: no sockets, clocks, threads or shared memory. Events come in as method calls, actions come out of
:meth:`Ledger.advance`. The one thing it must know from outside at once, whether a slot's part is free of late writers,
it asks through ``arm`` (see ``link.slots``).

A batch lives in a slot and is made of parts, one slice each. A part's life:

    wanted --ask--> asked --filled, by the very request that is current--> done
       ^              |
       +--------------+  its node is lost, or says that it could not

Each ask has a number of its own, never used again; an answer to any other number than the part's current one is a
duplicate and refused. Batches are delivered in the schedule's order and each once, since a part is done once.
A slot whose part cannot be armed is condemned until it can: the batch moves to a free slot, else to that of a younger
batch that has nothing under way, else it waits for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from loader_service.client.plan import Plan, Schedule

Arm = Callable[[int, int], int | None]
"""(slot, part) -> the part's new generation, or None while a late writer holds it."""

ASKS_PER_WORKER: Final = 3
"""Slices asked of a node at a time, per worker: one in work, one waiting at the worker, one at the front."""

NO_SLOT: Final = -1

MAX_EXCUSES: Final = 20
"""How often a part may be refused for no record's fault before the run is called broken."""


@dataclass(frozen=True)
class EpochAccount:
    """What became of one epoch, in positions of this rank.

    Fields:
        epoch: which.
        expected: positions that this loader had to deliver, from where it (or the state it resumed from) began.
        delivered: positions returned to the caller so far, each once.
        duplicates_refused: answers that came for a slice which had been given up or was already there.
        reassigned: slices asked for again, because their node was lost or could not make them.
        substituted: positions whose record was bad and whose pixels are another's.
    """

    epoch: int
    expected: int
    delivered: int = 0
    duplicates_refused: int = 0
    reassigned: int = 0
    substituted: int = 0


@dataclass(eq=False)
class Part:
    """One slice of a batch."""

    first: int  # position
    count: int
    offset: int  # sample within the batch
    index: int  # part within the slot
    state: str = "wanted"  # wanted | asked | done
    ask: int = -1
    received: int = 0  # bytes of its pixels that have come, of an ask that is answered in frames
    excuses: int = 0
    excluded: tuple[int, ...] = ()  # what the ask that is current excludes
    refused_by: set[str] = field(default_factory=set)  # nodes that called a record of it bad


@dataclass(eq=False)
class Batch:
    """One batch in the making."""

    plan: Plan
    slot: int  # NO_SLOT while it waits for another one
    parts: list[Part]

    @property
    def done(self) -> bool:
        """Whether every part has come."""
        return all(part.state == "done" for part in self.parts)

    @property
    def asked(self) -> bool:
        """Whether a part is under way."""
        return any(part.state == "asked" for part in self.parts)


@dataclass(eq=False)
class Node:
    """A node that may be asked: how many slices at once, and which are under way."""

    capacity: int
    asks: dict[int, tuple[Batch, Part]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """Send a node a request for a part; its slot's part has been armed with ``generation``."""

    node: str
    number: int
    batch: Batch
    part: Part
    generation: int


@dataclass(frozen=True)
class Deliver:
    """Hand a complete batch to the caller; its slot comes back by :meth:`Ledger.slot_returned`."""

    batch: Batch


@dataclass(frozen=True)
class Finish:
    """Everything is delivered."""


Action = Ask | Deliver | Finish


class Ledger:
    """The account of one run of a loader.

    Args:
        schedule: which batches there are.
        epoch, position: where to begin.
        slots: the slots that are free.
        slice_samples: most positions per slice.
        arm: see above.
        numbers: gives each ask its number; shared by all ledgers of a client, so that no number is used twice.
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
        self._nodes: dict[str, Node] = {}
        self._accounts: dict[int, EpochAccount] = {}

    # Events

    def node_up(self, node: str, workers: int) -> None:
        """A node can be asked."""
        self._nodes.setdefault(node, Node(workers * ASKS_PER_WORKER))

    def node_down(self, node: str) -> None:
        """A node is lost: what it was asked for is wanted again."""
        lost = self._nodes.pop(node, None)
        if lost:
            for batch, part in lost.asks.values():
                self._want_again(batch, part)

    def is_current(self, node: str, number: int) -> tuple[Batch, Part] | None:
        """The part that an ask is for, if it is still waited for; where frames are to be copied to."""
        known = self._nodes.get(node)
        return known.asks.get(number) if known else None

    def filled(self, node: str, number: int) -> bool:
        """A node says that a slice is complete; False if it was a duplicate."""
        found = self.is_current(node, number)
        if found is None:
            self._count_duplicate()
            return False
        del self._nodes[node].asks[number]
        found[1].state = "done"
        return True

    def excused(self, node: str, number: int) -> bool:
        """A node could not make a slice, through no record's fault; False if nobody waits for it.

        The part is wanted again. True also says that it may be tried again; see :attr:`Part.excuses`.
        """
        found = self.is_current(node, number)
        if found is None:
            return False
        del self._nodes[node].asks[number]
        found[1].excuses += 1
        self._want_again(*found)
        return True

    def bad(self, node: str, number: int) -> bool:
        """A node calls a record of a slice bad; the part is wanted again.

        Returns:
            True if every node that is there has refused this part, so that the record is to be judged: excluded, or
            the end of the run. False if another node may still read it, or nobody waits for the answer.
        """
        found = self.is_current(node, number)
        if found is None:
            return False
        batch, part = found
        del self._nodes[node].asks[number]
        part.refused_by.add(node)
        self._want_again(batch, part)
        return part.refused_by >= self._nodes.keys()

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

    def advance(self) -> list[Action]:
        """Everything that can be done now: retry condemned slots, open batches, ask for parts, deliver."""
        self._pardon()
        self._place()
        self._open()
        actions: list[Action] = [*self._asks(), *self._deliveries()]
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
        return sum(len(node.asks) for node in self._nodes.values())

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

    def _asks(self) -> list[Ask]:
        asks: list[Ask] = []
        for batch in self._batches:
            if not any(len(node.asks) < node.capacity for node in self._nodes.values()):
                break
            if batch.slot != NO_SLOT:
                asks += self._asks_of(batch)
        return asks

    def _asks_of(self, batch: Batch) -> list[Ask]:
        """Ask for the parts of a batch that are wanted; for none if its slot turns out to have a late writer."""
        asks: list[Ask] = []
        for part in batch.parts:
            if part.state != "wanted":
                continue
            name = self._least_loaded(part.refused_by)
            if name is None:
                continue
            generation = self._arm(batch.slot, part.index)
            if generation is None:
                self._condemn(batch)
                return []
            part.state, part.ask, part.excluded, part.received = "asked", next(self._numbers), self.excluded, 0
            self._nodes[name].asks[part.ask] = (batch, part)
            asks.append(Ask(name, part.ask, batch, part, generation))
        return asks

    def _least_loaded(self, refused_by: set[str]) -> str | None:
        """The node with the smallest share of its capacity in use, if one has room that has not refused the part."""
        if refused_by >= self._nodes.keys():
            refused_by.clear()  # those that might have read it have gone since: ask again, and judge again
        roomy = [
            (len(node.asks) / node.capacity, name)
            for name, node in self._nodes.items()
            if len(node.asks) < node.capacity and name not in refused_by
        ]
        return min(roomy)[1] if roomy else None

    def _deliveries(self) -> Iterator[Deliver]:
        while self._batches and self._batches[0].done:
            yield Deliver(self._batches.popleft())

    def _want_again(self, batch: Batch, part: Part) -> None:
        part.state = "wanted"
        self._change(batch.plan.epoch, reassigned=1)

    def _condemn(self, batch: Batch) -> None:
        """Take a batch out of its slot, since a late writer holds a part of it; all its parts are made anew."""
        self._condemned.append((batch.slot, len(batch.parts)))
        for node in self._nodes.values():
            for number in [n for n, (b, _) in node.asks.items() if b is batch]:
                del node.asks[number]
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
