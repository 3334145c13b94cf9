"""What a ledger tells its session to do, and the batches that it is about."""

from __future__ import annotations

from dataclasses import dataclass, field

from loader_service.client.plan import Plan


@dataclass(eq=False)
class Part:
    """One slice of a batch."""

    first: int  # position
    count: int
    offset: int  # sample within the batch
    index: int  # part within the slot
    state: str = "wanted"  # wanted | asked | done
    ask: int = -1
    asked_at: float = 0.0
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
    def wanting(self) -> bool:
        """Whether a part is to be asked for."""
        return any(part.state == "wanted" for part in self.parts)

    @property
    def asked(self) -> bool:
        """Whether a part is under way."""
        return any(part.state == "asked" for part in self.parts)


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


@dataclass(frozen=True)
class Standstill:
    """A node is there, but has long given nothing of what it owes: tell of it, once.

    Fields:
        node: which.
        still_s: for how long it has given nothing.
        owed: how many slices it owes.
        oldest, oldest_s: the first of them, and how long ago it was asked for.
        next_batch: the one that is to be delivered next, whoever owes what it lacks.
        elsewhere: whether other nodes are asked instead.
    """

    node: str
    still_s: float
    owed: int
    oldest: Part
    oldest_s: float
    next_batch: Batch
    elsewhere: bool

    def __str__(self) -> str:
        part, batch = self.oldest, self.next_batch
        done = sum(p.state == "done" for p in batch.parts)
        return (
            f"node {self.node} answers, but has given nothing for {self.still_s:.0f} s: it owes {self.owed} slices, the "
            f"oldest of positions {part.first} to {part.first + part.count} since {self.oldest_s:.0f} s; the next batch, "
            f"at position {batch.plan.start} of epoch {batch.plan.epoch}, has {done} of {len(batch.parts)} slices; "
            + ("others are asked instead" if self.elsewhere else "there is no other node to ask")
        )


Action = Ask | Deliver | Finish | Standstill
