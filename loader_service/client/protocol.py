"""The client's side of the protocol, without I/O: which node to ask for which slice, and what each answer means.

:class:`ClientProtocol` is a state machine. Events come in as method calls; everything that a node says comes in by one of
them, :meth:`ClientProtocol.receive`. Actions come out as return values, and :mod:`loader_service.client.session` carries
them out. Nothing here opens a socket, reads a clock, starts a thread or touches shared memory: the time is an argument,
and payload frames are represented by their sizes. One question cannot wait for an event, namely if a late writer still
holds a part of a slot. ``Run.arm`` answers it (see :mod:`loader_service.wire.shm`).

Read :meth:`ClientProtocol.receive` and :meth:`Ledger.advance` first; everything else serves these two.

Nodes
    A node is one address. :class:`NodeState` is the progress of its handshake::

        from        event                                               to
        CONNECTING  Welcome                                             WELCOMED
        WELCOMED    a run begins without shared memory                  WORKING    (slices in frames)
        WELCOMED    Attached, the answer to our Attach                  WORKING    (shared if it is accepted)
        WORKING     Welcome again, after a reconnection                 WELCOMED
        any         lost                                                CONNECTING

    A node is lost when its connection or one of its open lanes is cut, when it is silent for ``NODE_SILENT_S``, when
    it sends anything that this protocol does not allow, and when it answers UnknownClient. A lost node is greeted
    again until it answers.

Nodes that do not serve
    A node that does not serve is stood down: nothing is sent to it during a pause, which doubles each time, up to
    ``MAX_PAUSE_S``. The others go on meanwhile. There are two causes.

    - It is *refused*: it would give other bytes, speaks another version, takes no more clients, refuses the key, or is no
      node at all. After the pause it is greeted again. The client ends with the error if every address is refused.
    - It is *sick*: ``SICK_AFTER`` slices in a row failed there, not because of a bad record, or it sent what the protocol
      does not allow. After the pause it is asked for one slice; if that comes, it is well. The run ends if all nodes that
      are not refused have failed the same slice ``MAX_FAILURES`` times each.

Parts
    A batch lives in a slot and has one part per slice. :class:`PartState` is the progress of a part::

        from        event                                               to
        WANTED      Ask is sent, with a new number                      ASKED
        ASKED       Filled, with that number                            DONE
        ASKED       Failed; the node is lost, is stood down, or         WANTED
                    stands still and there are others
        any         its batch loses its slot                            WANTED

Invariants
    - A node owes slices only while it is WORKING.
    - A part is ASKED if and only if exactly one node owes its current number.
    - A number is used once per client, not once per run. An answer with a number that its node does not owe is a
      duplicate: it is counted and changes nothing. So every position is delivered exactly once.
    - A slot is in exactly one place: free, blocked by a late writer, with one pending batch, or in the caller's hands.
    - A batch without a slot has only WANTED parts.
    - Batches are delivered in the order of the schedule.

Blocked slots
    If a late writer holds a part, the whole slot is blocked, and its batch moves: to a free slot, else to the slot of a
    younger batch with no ASKED part, else it waits. The slot is free again once all its parts can be armed.

Standstill
    A node may answer pings and still make nothing: its disk hangs, or a request was lost. A node stands still when it has
    owed slices for ``NODE_STALL_S`` and has sent nothing: no slice, no piece of one, no failure. If there are other nodes,
    they are asked for what it owes, and it is asked for nothing more until it sends something again.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal

from msgspec.structs import replace

from loader_service import defaults
from loader_service.client.plan import Plan, Schedule
from loader_service.errors import (
    LinkError,
    MessageError,
    NodeFailed,
    NodeFull,
    NodeRefused,
    RecordError,
    SharedMemoryError,
    TooManyBadRecords,
)
from loader_service.types import BUILTIN_GOLDEN, DatasetFacts, EpochAccount, Split
from loader_service.wire import messages

GREET_AGAIN_S: Final = 2.0
"""Seconds without an answer after which Hello is sent again."""

FIRST_COMPLAINT_S: Final = 2.0
"""Seconds without a working node after which the client says that it waits. The interval doubles each time."""

SICK_AFTER: Final = 3
"""Failures in a row, of any slices, after which a node is sick. One or two may be accidents, such as a worker that died."""

FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 30.0
"""Pause of a node that does not serve: the first one, and the longest. A node that is repaired is used half a minute later."""

MAX_FAILURES: Final = 6
"""Failures of one part at one node that name no bad record, before the node has failed it for good. With the pauses between
them that takes half a minute, in which a disk or a mount may come back."""

EXPECT_S: Final = 5.0
"""Seconds in which a node that was just found or lost is expected to work (again), before a record is called bad without it. A
replaced record stays replaced, so the first node to answer, or the last one left for a moment, must not decide alone."""

NO_SLOT: Final = -1

Transport = Literal["auto", "shm", "tcp"]

Arm = Callable[[int, int], int | None]
"""(slot, part) -> the part's new generation, or None while a late writer holds the part."""


# States


class NodeState(IntEnum):
    """Progress of the handshake with a node; the module docstring has the transitions."""

    CONNECTING = 0  # nothing is known, or the node was lost
    WELCOMED = 1  # it serves what this client needs
    WORKING = 2  # it can be asked for slices


class PartState(IntEnum):
    """Progress of a part; the module docstring has the transitions."""

    WANTED = 0
    ASKED = 1
    DONE = 2


# eq=False: compared by identity, here and below, since two batches may have equal parts.
@dataclass(eq=False)
class Part:
    """One slice of a pending batch.

    Fields:
        first, count: its positions in the epoch.
        offset: its first sample within the batch.
        index: its number within the slot.
        state: progress of the part.
        number: the request that is current; answers to any other are duplicates.
        asked_at: time of that request, in seconds.
        received: bytes of its pixels that have arrived, for a request that is answered in frames.
        failures: by node, how often it failed to make this part without naming a bad record, and the last reason.
        excluded: the records that the current request excludes, ascending.
        refused_by: by node, its refusal, which names a bad record of the part.
    """

    first: int
    count: int
    offset: int
    index: int
    state: PartState = PartState.WANTED
    number: int = -1  # no request yet; numbers start at 1
    asked_at: float = 0.0
    received: int = 0
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    excluded: tuple[int, ...] = ()
    refused_by: dict[str, messages.Failed] = field(default_factory=dict)


@dataclass(eq=False)
class PendingBatch:
    """One batch in the making; ``slot`` is NO_SLOT while it waits for another slot."""

    plan: Plan
    slot: int
    parts: list[Part]

    @property
    def done(self) -> bool:
        """True if every part has arrived; an empty batch is done at once."""
        return all(part.state is PartState.DONE for part in self.parts)

    @property
    def wanting(self) -> bool:
        """True if some part is to be asked for."""
        return any(part.state is PartState.WANTED for part in self.parts)

    @property
    def asked(self) -> bool:
        """True if some part is asked for."""
        return any(part.state is PartState.ASKED for part in self.parts)


Asked = tuple[PendingBatch, Part]
"""The subject of a request."""


@dataclass(eq=False)
class NodeRecord:
    """The core's knowledge of one node.

    Fields:
        address: its address, which is its name here.
        state: progress of the handshake.
        listed: True while the names that the user gave still lead to this address.
        instance: identity of the node's process, from its Welcome.
        workers: its worker processes.
        shared: True if it writes into this client's shared memory; else slices come in frames.
        lanes: numbers of the connections that carry slices, ascending; 0 also carries every other message.
        turns: slices requested in frames so far; they use the lanes in turn.
        heard_at, greeted_at, pinged_at: times in seconds of its last message, our last Hello, our last Ping.
        asks: what it owes, by the request's number, the oldest first.
        still_since: time from which on it has owed slices and sent nothing; None if it owes nothing or just sent something.
        still: True if that time exceeds ``NODE_STALL_S``.
        refused: the error that says why it is refused; None if it is not.
        failures: slices in a row that it failed to make.
        pauses: how often it was stood down since it last served; 0 if it is well.
        back_at: end of its pause, in seconds; it is past if it is not stood down.
        resting: True until the first ``advance`` after that time.
        away_since: time of the first tick at which it was found or lost; None before that tick, and while it is WORKING.
        refusals: slices that it refused because of a bad record.
    """

    address: str
    state: NodeState = NodeState.CONNECTING
    listed: bool = True
    instance: str = ""
    workers: int = 0
    shared: bool = False
    lanes: list[int] = field(default_factory=lambda: [0])
    turns: int = 0
    heard_at: float = -math.inf
    greeted_at: float = -math.inf  # so that the first tick greets
    pinged_at: float = -math.inf
    asks: dict[int, Asked] = field(default_factory=dict)  # numbers only grow, so insertion order is age
    still_since: float | None = None
    still: bool = False
    refused: LinkError | None = None
    failures: int = 0
    pauses: int = 0
    back_at: float = -math.inf
    resting: bool = False
    away_since: float | None = None
    refusals: int = 0

    @property
    def load(self) -> float:
        """The share of its capacity that is in use, 0 to 1."""
        # A Welcome has at least one worker, and no node is asked before it.
        return len(self.asks) / (self.workers * defaults.ASKS_PER_WORKER)

    @property
    def has_room(self) -> bool:
        """True if it may be asked for one more slice. After a pause one slice shows whether it is well again."""
        return len(self.asks) < (1 if self.pauses else self.workers * defaults.ASKS_PER_WORKER)

    def owe(self, number: int, asked: Asked, now: float) -> None:
        """Record a request."""
        self.asks[number] = asked
        # Later requests do not restart the clock.
        self.still_since = now if self.still_since is None else self.still_since

    def stir(self) -> None:
        """Record that it has sent something, even a late answer: it does not stand still."""
        self.still_since, self.still = None, False

    def stand_down(self, now: float) -> float:
        """Begin a pause; return its length in seconds."""
        pause_s = min(FIRST_PAUSE_S * 2.0**self.pauses, MAX_PAUSE_S)
        self.pauses, self.failures = min(self.pauses + 1, 16), 0  # bounded, so that 2.0**pauses is
        self.back_at, self.resting = now + pause_s, True
        return pause_s

    def recover(self) -> bool:
        """Record that it serves; return True if it did not before."""
        was_down, self.pauses, self.failures = self.pauses > 0, 0, 0
        self.refused, self.back_at, self.resting = None, -math.inf, False
        return was_down

    def take_asks(self) -> list[Asked]:
        """Return what it owes and forget it."""
        taken, self.asks = list(self.asks.values()), {}
        return taken

    def next_lane(self) -> int:
        """Return the lane for the next slice in frames; open lanes take turns."""
        self.turns += 1
        return self.lanes[self.turns % len(self.lanes)]


@dataclass(frozen=True)
class Run:
    """The parameters of one run.

    Fields:
        schedule: the batches of the run.
        epoch, position: the place to begin at.
        slots: number of slots, 0 .. slots - 1.
        slice_samples: positions per slice; a batch's last slice may have fewer.
        pixel_bytes, tail_bytes: one sample's bytes in a slice that comes in frames: pixels; label and draws.
        arm: see :data:`Arm`.
        transport: ``shm`` or ``tcp`` to force one; ``auto`` shares memory with each node that can.
        attach: the message that asks a node to write into the slots; None if nodes cannot open them.
        excluded: records that are known to be bad, ascending.
        continues: True to keep the accounts of the run before.
    """

    schedule: Schedule
    epoch: int
    position: int
    slots: int
    slice_samples: int
    pixel_bytes: int
    tail_bytes: int
    arm: Arm
    transport: Transport = "auto"
    attach: messages.Attach | None = None
    excluded: tuple[int, ...] = ()
    continues: bool = False


@dataclass(frozen=True)
class Quarantined:
    """A record that no node can read, the file that it was made from (empty if unknown), and the reason."""

    record: int
    source: str
    reason: str


# Actions


@dataclass(frozen=True)
class Connect:
    """Open a connection to a node."""

    node: str


@dataclass(frozen=True)
class Disconnect:
    """Say goodbye to a node and close its connection."""

    node: str


@dataclass(frozen=True)
class OpenLanes:
    """Open lanes until there are ``connections`` with a node, since it sends slices in frames.

    One TCP connection keeps one core busy at either end, so several are faster where there are cores.
    """

    node: str
    connections: int


@dataclass(frozen=True)
class Send:
    """Send a node a message, by one of its lanes. The message is dropped if there is no connection."""

    node: str
    message: messages.FromClient
    lane: int = 0


@dataclass(frozen=True)
class Ask:
    """Request a slice from a node. If that cannot be sent, the node is :meth:`~ClientProtocol.disconnected`.

    Fields:
        node, instance: the node's address, and the process that was welcomed there.
        number: the request's number.
        batch, part: the slice's batch and part.
        generation: the generation that the slot's part is armed with.
        shared: True to have it written into shared memory, False to have it sent in frames.
        lane: number of the connection that carries the frames.
    """

    node: str
    instance: str
    number: int
    batch: PendingBatch
    part: Part
    generation: int
    shared: bool
    lane: int


@dataclass(frozen=True)
class CopyPixels:
    """Copy the frame that came with this message to the pixels of a part, from byte ``start`` on."""

    batch: PendingBatch
    part: Part
    start: int


@dataclass(frozen=True)
class CopyTail:
    """Copy the frame that came with this message to the labels and draws of a part."""

    batch: PendingBatch
    part: Part


@dataclass(frozen=True)
class Ready:
    """Report that the first node has been welcomed, so that the dataset's facts are known."""


@dataclass(frozen=True)
class Deliver:
    """Hand a complete batch to the caller; its slot comes back by :meth:`ClientProtocol.slot_returned`."""

    batch: PendingBatch


@dataclass(frozen=True)
class Inform:
    """Log a line that needs no attention."""

    text: str


@dataclass(frozen=True)
class Warn:
    """Log a warning."""

    text: str


@dataclass(frozen=True)
class Standstill:
    """Log a warning that a node has come to a standstill; ``str()`` gives the line.

    Fields:
        node: the node's address.
        still_s: seconds that it has given nothing.
        owed: number of slices that it owes.
        oldest, oldest_s: the first of them, and seconds since it was asked for.
        next_batch: the batch that is delivered next, which may wait for another node.
        elsewhere: True if other nodes are asked instead.
    """

    node: str
    still_s: float
    owed: int
    oldest: Part
    oldest_s: float
    next_batch: PendingBatch
    elsewhere: bool

    def __str__(self) -> str:
        part, batch = self.oldest, self.next_batch
        done = sum(p.state is PartState.DONE for p in batch.parts)
        return (
            f"node {self.node} answers pings, but has delivered nothing for {self.still_s:.0f} s: it owes {self.owed} "
            f"slices, the oldest (positions {part.first} to {part.first + part.count - 1}) for {self.oldest_s:.0f} s; "
            f"the next batch, at position {batch.plan.start} of epoch {batch.plan.epoch}, has {done} of "
            f"{len(batch.parts)} slices; "
            + ("other nodes are asked instead" if self.elsewhere else "there is no other node to ask")
        )


Action = (
    Connect | Disconnect | OpenLanes | Send | Ask | CopyPixels | CopyTail | Ready | Deliver | Inform | Warn | Standstill
)


# The account of one run


class Ledger:
    """The account of one run: pending batches, slots, and the slices that nodes owe.

    Args:
        run: the run's parameters.
        nodes: all nodes by address; only those that are WORKING are asked.
        numbers: gives each request its number; the same for all ledgers of a client, so that no number is used twice.
        out: slots in the caller's hands; outlives the ledger.
        earlier: accounts to continue.
    """

    def __init__(
        self,
        run: Run,
        nodes: Mapping[str, NodeRecord],
        numbers: Iterator[int],
        out: set[int],
        earlier: Iterable[EpochAccount] = (),
    ) -> None:
        self.run, self.excluded = run, run.excluded
        self._nodes, self._numbers, self._out = nodes, numbers, out
        self._plans = run.schedule.batches(run.epoch, run.position)  # lazy: the plans of a run are never all in memory
        self._exhausted = False
        # The caller's slots of an earlier run come back by slot_returned.
        self._free = deque(slot for slot in range(run.slots) if slot not in out)
        self._blocked: list[tuple[int, int]] = []  # slot, and how many parts of it were in use
        self._batches: deque[PendingBatch] = deque()  # in the order of delivery
        self._accounts = {account.epoch: account for account in earlier}
        self._newest = -1  # the last epoch whose account this run has opened

    # Events

    def fill(self, record: NodeRecord, number: int) -> None:
        """Mark the slice that a node owed under this number as done; count a duplicate if it owed none."""
        asked = record.asks.pop(number, None)
        if asked is None:
            self._count_duplicate()  # no pixels were copied: _pixels and _filled look the number up first
        else:
            asked[1].state = PartState.DONE

    def retry(self, record: NodeRecord, number: int, reason: str) -> None:
        """Mark as wanted again a slice that its node failed to make, for a reason other than a bad record.

        Raises:
            NodeFailed: every node that may serve has failed it MAX_FAILURES times.
        """
        batch, part = record.asks.pop(number)
        part.failures[record.address] = part.failures.get(record.address, (0, ""))[0] + 1, reason
        self._want_again(batch, part)
        # Also nodes that are lost: one that comes back may make it.
        able = [node.address for node in self._nodes.values() if node.refused is None]
        if all(part.failures.get(address, (0, ""))[0] >= MAX_FAILURES for address in able):
            reasons = "; ".join(f"at {address}: {part.failures[address][1]}" for address in able)
            raise NodeFailed(
                f"no node could make positions {part.first} to {part.first + part.count - 1} of epoch {batch.plan.epoch}, "
                f"each tried {MAX_FAILURES} times: {reasons}"
            )

    def refuse(self, record: NodeRecord, failed: messages.Failed, now: float) -> tuple[str, messages.Failed] | None:
        """Mark a slice as wanted again because its node found a bad record in it.

        Returns:
            If every node that can be asked has refused this part: the address of one of them and its refusal, whose record
            must be excluded, or the run must end. None if another node may still read the slice.
        """
        batch, part = record.asks.pop(failed.id)
        self._want_again(batch, part)
        if failed.record in self.excluded:  # since this part was requested
            return None
        record.refusals += 1
        part.refused_by[record.address] = failed
        if not self._refused_by_all(part) or self._expecting(part, now):
            return None
        # They may name different records, since each names the first that it cannot read. The node with the fewest
        # refusals is the most credible, since one that has lost its disk names good records, too; then the majority is.
        votes = Counter(refusal.record for refusal in part.refused_by.values())
        address, refusal = min(
            part.refused_by.items(),
            key=lambda item: (self._refusals_of(item[0]), -votes[item[1].record], item[0]),
        )
        return address, refusal

    def release(self, record: NodeRecord) -> None:
        """Mark all slices that a node owes as wanted again."""
        for batch, part in record.take_asks():
            self._want_again(batch, part)

    def exclude(self, bad: int) -> None:
        """Exclude a record from all later requests; slices that are asked for already may still hold its pixels."""
        self.excluded = tuple(sorted({*self.excluded, bad}))  # a new tuple: the caller's thread may hold the old one
        for batch in self._batches:
            for part in batch.parts:
                part.refused_by.clear()  # its next request names other records

    def slot_returned(self, slot: int) -> None:
        """Take a slot back from the caller."""
        self._free.append(slot)

    # Actions

    def advance(self, now: float) -> list[Action]:
        """Return the actions that are possible now, after taking back blocked slots and opening batches.

        The order matters: batches that lost their slot get a free one before a new batch can take it, and standstills
        are found before requests are made, so that slices of a node that stands still are requested elsewhere at once.
        """
        for node in self._nodes.values():
            node.resting = node.resting and now < node.back_at
        if self._blocked:
            self._unblock()
        self._place()
        self._open()
        # The generators run here, from left to right: a standstill releases slices that the requests then take.
        return [*self._standstills(now), *self._asks(now), *self._deliveries()]

    @property
    def accounts(self) -> list[EpochAccount]:
        """The account of each epoch that has begun, in order; the caller counts ``delivered``."""
        # sorted() copies the keys in one step under the GIL.
        return [self._accounts[epoch] for epoch in sorted(self._accounts)]

    @property
    def pending(self) -> int:
        """Number of batches in the making."""
        return len(self._batches)

    # Batches

    def _open(self) -> None:
        """Open batches in the schedule's order while there are free slots."""
        while self._free and not self._exhausted:
            plan = next(self._plans, None)
            if plan is None:
                self._exhausted = True
                return
            self._open_account(plan.epoch)
            self._batches.append(PendingBatch(plan, self._free.popleft(), self._cut(plan)))

    def _cut(self, plan: Plan) -> list[Part]:
        """Return a batch's parts. Part i of every slot begins at the same sample, so it stands for one place in memory."""
        size = self.run.slice_samples
        firsts = range(0, plan.count, size)  # empty for an empty batch
        return [Part(plan.first + low, min(size, plan.count - low), low, i) for i, low in enumerate(firsts)]

    def _deliveries(self) -> Iterator[Deliver]:
        # Only the oldest batch may leave: a younger one that is done waits in its slot, so batches stay in order.
        while self._batches and self._batches[0].done:
            batch = self._batches.popleft()
            self._out.add(batch.slot)  # also for the next run's ledger, which must not use the slot
            yield Deliver(batch)

    def _want_again(self, batch: PendingBatch, part: Part) -> None:
        part.state = PartState.WANTED
        self._count(batch.plan.epoch, reassigned=1)

    # Requests

    def _asks(self, now: float) -> list[Ask]:
        """Ask for wanted parts, the oldest batch first, while nodes have room."""
        asks: list[Ask] = []
        for batch in self._batches:
            if batch.slot != NO_SLOT and batch.wanting:
                if not any(node.has_room for node in self._askable()):
                    break  # younger batches would find no room either
                asks += self._asks_of(batch, now)
        return asks

    def _asks_of(self, batch: PendingBatch, now: float) -> list[Ask]:
        """Ask for the wanted parts of a batch; for none if a late writer holds a part of its slot."""
        asks: list[Ask] = []
        for part in batch.parts:
            if part.state is not PartState.WANTED:
                continue
            node = self._choose(part, now)
            if node is None:  # no node with room may read this part; another part may have one
                continue
            generation = self.run.arm(batch.slot, part.index)  # voids every earlier lease on this part
            if generation is None:
                self._block(batch)
                return []  # nothing was sent yet, so the requests above are dropped with the slot
            number = next(self._numbers)
            part.state, part.number, part.asked_at, part.received = PartState.ASKED, number, now, 0
            part.excluded = self.excluded  # kept: the ledger's list may grow before the answer comes
            node.owe(number, (batch, part), now)
            lane = 0 if node.shared else node.next_lane()  # in shared memory only a Filled comes back
            asks.append(Ask(node.address, node.instance, number, batch, part, generation, node.shared, lane))
        return asks

    def _choose(self, part: Part, now: float) -> NodeRecord | None:
        """Return the node to ask for a part; None if no node has room for it.

        Nodes that failed the part less often come first; then those whose pause is over, since only a slice shows that they are
        well, and others may never be too busy for it; then those with the smallest load. A node that has called a record of it
        bad is not asked.
        """
        if part.refused_by and self._refused_by_all(part):
            if self._expecting(part, now):
                return None
            # The nodes that might have read it are gone: ask those that are left again, and judge again.
            part.refused_by.clear()
        roomy = [node for node in self._askable() if node.has_room and node.address not in part.refused_by]
        # Equal loads: by address, so that the choice is reproducible.
        return min(
            roomy,
            key=lambda node: (part.failures.get(node.address, (0,))[0], not node.pauses, node.load, node.address),
            default=None,
        )

    def _refused_by_all(self, part: Part) -> bool:
        """Return whether every node that can be asked has called a record of a part bad."""
        # A superset: it may also name nodes that are gone.
        return part.refused_by.keys() >= {node.address for node in self._askable()}

    def _refusals_of(self, address: str) -> float:
        node = self._nodes.get(address)
        return math.inf if node is None else node.refusals  # a node that is gone decides last

    def _expecting(self, part: Part, now: float) -> bool:
        """Return whether another node, which may read a part, is expected to work soon."""
        return any(
            node.state is not NodeState.WORKING
            and node.listed
            and node.refused is None
            and node.address not in part.refused_by
            and (node.away_since is None or now - node.away_since < EXPECT_S)
            for node in self._nodes.values()
        )

    def _askable(self) -> list[NodeRecord]:
        """Return the working nodes that are not stood down and do not stand still; all of the former if every one does."""
        working = [node for node in self._nodes.values() if node.state is NodeState.WORKING and not node.resting]
        return [node for node in working if not node.still] or working

    # Slots

    def _block(self, batch: PendingBatch) -> None:
        """Take a batch out of its slot because a late writer holds a part of it; all its parts are wanted again."""
        self._blocked.append((batch.slot, len(batch.parts)))
        for node in self._nodes.values():  # answers to the batch's requests are duplicates from now on
            node.asks = {number: asked for number, asked in node.asks.items() if asked[0] is not batch}
        self._evict(batch)

    def _unblock(self) -> None:
        """Free the blocked slots whose late writers are gone."""
        still_blocked = []
        for slot, parts in self._blocked:
            # Arming also gives each part a new generation, so that no earlier request can write it any more.
            if all(self.run.arm(slot, index) is not None for index in range(parts)):
                self._free.append(slot)
            else:
                still_blocked.append((slot, parts))
        self._blocked = still_blocked

    def _evict(self, batch: PendingBatch) -> None:
        batch.slot = NO_SLOT  # DONE parts, too: their bytes stay in the slot that is given up
        for part in batch.parts:
            part.state = PartState.WANTED

    def _place(self) -> None:
        """Find slots for batches without one, oldest first, since the oldest is delivered next."""
        for index, batch in enumerate(self._batches):
            if batch.slot != NO_SLOT:
                continue
            if self._free:
                batch.slot = self._free.popleft()
                continue
            # A younger batch with no ASKED part can give its slot away: no node writes there.
            younger = itertools.islice(self._batches, index + 1, None)
            victims = [other for other in younger if other.slot != NO_SLOT and not other.asked]
            if not victims:  # batches after this one would find even fewer
                return
            batch.slot = victims[-1].slot  # the youngest is delivered last
            self._evict(victims[-1])

    # Standstill

    def _standstills(self, now: float) -> Iterator[Standstill]:
        """Report each node that has come to a standstill; if others deliver, take from it what it owes."""
        working = [node for node in self._nodes.values() if node.state is NodeState.WORKING]
        # A list: all nodes are updated before any is read.
        stopped = [node for node in working if self._has_stopped(node, now)]
        if not any(node.still for node in working):
            return
        moving = not all(node.still for node in working)
        for node in stopped:
            assert node.still_since is not None
            _, oldest = next(iter(node.asks.values()))  # dicts keep insertion order
            yield Standstill(
                node.address,
                now - node.still_since,
                len(node.asks),
                oldest,
                now - oldest.asked_at,
                self._batches[0],
                moving,
            )
        if moving:
            for node in working:
                if node.still:
                    self.release(node)  # also one that stopped earlier, when no other node could take over

    def _has_stopped(self, node: NodeRecord, now: float) -> bool:
        """Update a node's standstill; return True if it has just begun."""
        if node.still:
            return False
        if not node.asks or node.still_since is None:
            node.still_since = now if node.asks else None  # it has just answered, and may owe more
            return False
        node.still = now - node.still_since >= defaults.NODE_STALL_S
        return node.still

    # Accounts

    def _open_account(self, epoch: int) -> None:
        if epoch > self._newest:
            self._newest = epoch
            start = self.run.position if epoch == self.run.epoch else 0
            account = self._accounts.get(
                epoch, EpochAccount(epoch, 0)
            )  # of a run that was cut short, or of an earlier pass
            self._accounts[epoch] = replace(account, expected=self.run.schedule.expected(start))

    def _count_duplicate(self) -> None:
        if self._accounts:
            # The slice's epoch is forgotten: the latest stands for it.
            self._count(max(self._accounts), duplicates_refused=1)

    def _count(self, epoch: int, duplicates_refused: int = 0, reassigned: int = 0) -> None:
        old = self._accounts[epoch]
        # Replaced, never changed: the caller's thread may read it at any moment.
        self._accounts[epoch] = replace(
            old,
            duplicates_refused=old.duplicates_refused + duplicates_refused,
            reassigned=old.reassigned + reassigned,
        )


# The protocol


class ClientProtocol:
    """The protocol core of one client: its nodes and the run in progress.

    Every event returns the actions that it causes immediately. After a round of events, call :meth:`advance` once for the
    run's requests and deliveries. An error that an event raises ends the client.

    Args:
        name: the client's name, for people to read in a node's status.
        addresses: the nodes' addresses as the user gave them, for messages.
        split: the split that the nodes must serve.
        max_bad: most bad records that may be replaced; None ends the run at the first.
        connections: connections with each node that cannot write into this client's slots.

    Fields:
        facts: the dataset's facts, None until the first node is welcomed.
        slot_bytes: the first node's send slot, which bounds a slice.
        workers: the first node's worker processes.
        quarantine: the bad records found so far.
    """

    def __init__(
        self,
        name: str,
        addresses: tuple[str, ...],
        split: Split,
        *,
        max_bad: int | None = None,
        connections: int = 1,
    ) -> None:
        self._name, self._addresses, self._split = name, addresses, split
        self._max_bad, self._connections = max_bad, connections
        self.facts: DatasetFacts | None = None
        self.slot_bytes = 0
        self.workers = 1
        self.quarantine: list[Quarantined] = []
        self._nodes: dict[str, NodeRecord] = {}
        self._numbers = itertools.count(1)  # for all runs, so that an answer to an earlier run is a duplicate
        self._out: set[int] = set()  # slots on their way to the caller or in the caller's hands
        self._run: Run | None = None
        self._ledger: Ledger | None = None
        self._alone_since: float | None = None  # time since when no node works; None before the first tick
        self._complain_after_s = FIRST_COMPLAINT_S

    # State, which any thread may read

    @property
    def accounts(self) -> list[EpochAccount]:
        """The account of each epoch that has begun, in order; the caller counts ``delivered``."""
        ledger = self._ledger  # read once: the session's thread may replace it at any time
        return ledger.accounts if ledger else []

    @property
    def excluded(self) -> tuple[int, ...] | None:
        """The records that the run in progress excludes, ascending; None without a run."""
        ledger = self._ledger
        return ledger.excluded if ledger else None

    @property
    def pending(self) -> int:
        """Number of batches in the making."""
        ledger = self._ledger
        return ledger.pending if ledger else 0

    @property
    def owed(self) -> int:
        """Number of slices that nodes owe."""
        # For the session's thread alone, which adds and removes nodes.
        return sum(len(record.asks) for record in self._nodes.values())

    # Events

    def resolved(self, found: frozenset[str]) -> list[Action]:
        """Connect to new addresses; disconnect nodes whose address is no longer found, but not while they work."""
        actions: list[Action] = []
        for record in list(self._nodes.values()):  # a copy, since a node may be dropped
            record.listed = record.address in found
            actions += self._drop_if_unlisted(record)
        for address in sorted(found - self._nodes.keys()):  # sorted, so that the actions are reproducible
            self._nodes[address] = NodeRecord(address)
            actions.append(Connect(address))
        return actions

    def connected(self, node: str, now: float, lane: int = 0) -> Iterable[Action]:
        """Greet a node to which a connection has been made."""
        record = self._nodes.get(node)
        if record is None:
            return ()
        if lane:
            return [Send(node, messages.Ping(), lane)]  # the answer shows that the node knows the lane
        if now < record.back_at:  # the first tick after the pause greets it
            return ()
        return [self._greet(record, now)]  # after each reconnection, too: another process may listen there now

    def disconnected(self, node: str, now: float, lane: int = 0) -> Iterable[Action]:
        """Lose a node whose connection is cut. If an open lane is cut, reset the node: in-flight slices may be lost."""
        record = self._nodes.get(node)
        if record is None:
            return ()
        if not lane:
            return self._lose(record, "its connection was cut")
        was_open = lane in record.lanes  # if not, no request has named it yet and nothing can be lost
        record.lanes = [other for other in record.lanes if other != lane]
        if was_open and record.state is NodeState.WORKING:
            return self._reset(record, "one of its connections was cut", now)
        return ()

    def receive(
        self, node: str, message: messages.FromNode, now: float, lane: int = 0, sizes: Sequence[int] = ()
    ) -> Iterable[Action]:
        """Process one message from a node: the single entry for everything that nodes say.

        Args:
            node: the node's address.
            message: the decoded message.
            now: seconds on a clock that never goes back.
            lane: number of the lane that it arrived on.
            sizes: bytes of each payload frame that came with it; CopyPixels and CopyTail refer to the first.

        Raises:
            NodeRefused, NodeFull, MessageError: no address leads to a node that serves this client; this is the last reason.
            SharedMemoryError: the node cannot share memory, and the run demands it.
            RecordError, TooManyBadRecords: no node can read a record, and it may not be replaced.
            NodeFailed: a slice failed too often at every node.
        """
        record = self._nodes.get(node)
        if record is None:
            return ()
        record.heard_at = now  # any message is a sign of life, also a wrong one
        if lane not in record.lanes:
            # A lane is used from its first message on: before that the node may not know it and would drop slices.
            record.lanes = sorted([*record.lanes, lane])
        try:
            match message:
                case messages.Filled():  # first, since there is one per slice
                    return self._filled(record, message.id, sizes)
                case messages.Pixels():
                    return self._pixels(record, message, sizes)
                case messages.Failed():
                    return self._failed(record, message, now)
                case messages.Welcome():
                    return self._welcome(record, message)
                case messages.Refused(version, reason):
                    check_protocol(node, version)  # its error says more than the node's reason
                    return self.refuse(node, NodeFull(node, reason), now)
                case messages.Attached():
                    return self._attached(record, message)
                case messages.UnknownClient() if (
                    record.state is not NodeState.CONNECTING
                ):  # else it was greeted already
                    return self._reset(record, "it does not know this client (any more)", now)
                case messages.Ping():
                    return [Send(node, messages.Pong())]
        except MessageError as error:
            return self.malformed(node, error, now)
        except NodeRefused as error:
            return self.refuse(node, error, now)
        return ()  # a Pong is a sign of life and nothing more

    def malformed(self, node: str, error: MessageError, now: float, version: int | None = None) -> Iterable[Action]:
        """Lose and stand down a node that sent a message which this protocol does not allow.

        Args:
            node: the node's address.
            error: the flaw in the message.
            now: seconds on a clock that never goes back.
            version: the protocol version that the message states; None if it states none.

        Raises:
            NodeRefused, MessageError: see :meth:`refuse`; the node has another version, or never was a node.
        """
        record = self._nodes.get(node)
        if record is None or now < record.back_at:  # more of the same
            return ()
        try:
            check_protocol(node, version)
        except NodeRefused as refusal:
            return self.refuse(node, refusal, now)
        if not record.instance:  # it was never welcomed: something else answers there
            return self.refuse(
                node, MessageError(f"{node} sent what no node of this protocol sends ({error.reason})"), now
            )
        record.stand_down(now)
        return [Warn(f"node {node}: {error}"), *self._lose(record, "it does not speak this protocol")]

    def refuse(self, node: str, error: LinkError, now: float) -> Iterable[Action]:
        """Stand a node down that cannot serve this client.

        Raises:
            LinkError: no other address is left; this is ``error``.
        """
        record = self._nodes.get(node)
        if record is None:
            return ()
        news = str(error) != str(record.refused)
        if now < record.back_at and not news:
            return ()
        record.refused = error
        # Names that are not resolved yet have no record.
        if len(self._nodes) >= len(self._addresses) and all(other.refused for other in self._nodes.values()):
            raise error
        pause_s = record.stand_down(now)
        lost = self._lose(record, "it does not serve this client")
        return (
            [Warn(f"{error} It is tried again in {pause_s:.0f} s; other nodes serve meanwhile."), *lost]
            if news
            else lost
        )

    def begin(self, run: Run) -> list[Action]:
        """Begin a run and end the one in progress; slots in the caller's hands stay there."""
        for record in self._nodes.values():
            record.take_asks()  # answers to the last run's requests are duplicates in this one
            record.stir()  # what the last run was owed does not count
        earlier = self.accounts if run.continues else ()
        self._run = run
        self._ledger = Ledger(run, self._nodes, self._numbers, self._out, earlier)
        return [action for record in self._nodes.values() for action in self._employ(record)]

    def end(self) -> None:
        """End the run in progress without another, after an error."""
        self._ledger = None

    def slot_returned(self, slot: int) -> None:
        """Take back a slot whose arrays the caller has let go of."""
        self._out.discard(slot)
        if self._ledger:
            self._ledger.slot_returned(slot)

    def tick(self, now: float) -> list[Action]:
        """Greet nodes that have not answered, ping quiet ones, lose silent ones. Call it a few times per second."""
        # A copy, since a node may be dropped.
        actions = [action for record in list(self._nodes.values()) for action in self._tick(record, now)]
        return actions + self._complain(now)

    def advance(self, now: float) -> list[Action]:
        """Return what the run can do after the events so far: requests, deliveries, reports of standstills."""
        return self._ledger.advance(now) if self._ledger else []

    # The handshake

    def _greet(self, record: NodeRecord, now: float) -> Send:
        """Send Hello; it is dropped if there is no connection yet, and repeated after ``GREET_AGAIN_S``."""
        record.greeted_at = record.heard_at = now  # the answer may take NODE_SILENT_S
        return Send(record.address, messages.Hello(messages.PROTOCOL, self._name))

    def _welcome(self, record: NodeRecord, welcome: messages.Welcome) -> list[Action]:
        # Raises before this node or the client changes.
        facts = check_welcome(record.address, welcome, self._split, self.facts)
        actions: list[Action] = []
        if self.facts is None:
            self.facts, self.slot_bytes, self.workers = facts, welcome.slot_bytes, welcome.workers
            actions.append(Ready())
        elif welcome.slot_bytes < self.slot_bytes:  # slices are cut to the first node's send slots
            have, need = f"{welcome.slot_bytes} bytes", f"{self.slot_bytes} bytes"
            raise NodeRefused(record.address, "send slot", need, have)
        self._release(record)  # a second Welcome follows a reconnection, and what was asked before it is lost
        record.state = NodeState.WELCOMED
        if record.refused or welcome.instance != record.instance:  # a new process may be well
            record.recover()
        record.instance, record.workers = welcome.instance, welcome.workers
        return [*actions, *self._employ(record)]

    def _employ(self, record: NodeRecord) -> Iterable[Action]:
        """Have a node work for the run in progress, in shared memory if it can."""
        if self._run is None or record.state is NodeState.CONNECTING:  # the next begin or Welcome calls again
            return ()
        if self._run.transport == "tcp" or self._run.attach is None:
            return self._put_to_work(record, shared=False)
        if record.state is NodeState.WORKING:  # since an earlier run, whose slots are this one's
            return self._put_to_work(record, shared=record.shared)
        return [Send(record.address, self._run.attach)]

    def _attached(self, record: NodeRecord, answer: messages.Attached) -> Iterable[Action]:
        run = self._run
        # Late: another run has begun, or the node was lost meanwhile.
        if run is None or run.attach is None or answer.segment != run.attach.segment:
            return ()
        if record.state is not NodeState.WELCOMED:
            return ()
        if answer.accepted:
            return self._put_to_work(record, shared=True)
        if run.transport == "shm":
            raise SharedMemoryError(
                f"the node at {record.address} cannot share memory with this client ({answer.reason})",
                remedy="run both on one machine, as one user, with one /dev/shm; or let transport be auto",
            )
        text = f"node {record.address} cannot share memory with this client, so slices come in frames: {answer.reason}"
        return [Inform(text), *self._put_to_work(record, shared=False)]

    def _put_to_work(self, record: NodeRecord, *, shared: bool) -> Iterable[Action]:
        record.state, record.shared, record.away_since = NodeState.WORKING, shared, None
        return () if shared else [OpenLanes(record.address, self._connections)]

    # Losing nodes

    def _lose(self, record: NodeRecord, why: str) -> list[Action]:
        actions: list[Action] = []
        if record.state is NodeState.WORKING:  # one warning per loss: after this it is CONNECTING
            actions.append(Warn(f"node {record.address} is lost: {why}"))
        record.state = NodeState.CONNECTING
        self._release(record)
        return [*actions, *self._drop_if_unlisted(record)]

    def _reset(self, record: NodeRecord, why: str, now: float) -> list[Action]:
        """Lose a node whose connection still stands, and greet it immediately."""
        actions = self._lose(record, why)
        return [*actions, self._greet(record, now)] if record.listed else actions

    def _release(self, record: NodeRecord) -> None:
        if self._ledger:
            self._ledger.release(record)
        record.stir()

    def _drop_if_unlisted(self, record: NodeRecord) -> list[Action]:
        """Disconnect a node whose address is no longer found, unless it works."""
        if record.listed or record.state is NodeState.WORKING:
            return []
        del self._nodes[record.address]  # answers that are on their way find no record and are dropped
        return [Disconnect(record.address)]

    # Answers

    def _filled(self, record: NodeRecord, number: int, sizes: Sequence[int]) -> Iterable[Action]:
        if self._ledger is None:
            return ()
        record.stir()
        actions: list[Action] = []
        # In shared memory the slice is in its slot already: its Filled is all that there is to process.
        if (asked := record.asks.get(number)) and (sizes or not record.shared):
            actions = [self._tail(record, *asked, sizes)]
        self._ledger.fill(record, number)
        if asked and (record.failures or record.pauses) and record.recover():
            actions.append(Inform(f"node {record.address} serves again"))
        return actions

    def _tail(self, record: NodeRecord, batch: PendingBatch, part: Part, sizes: Sequence[int]) -> CopyTail:
        """Return the action for the last frame of a slice, or raise MessageError if the slice is not complete."""
        if record.shared or len(sizes) != 1:
            way = "in shared memory" if record.shared else "in frames"
            raise MessageError(f"a slice that was requested {way} ended with {len(sizes)} frames")
        pixel_bytes, tail_bytes = self._bytes_of(part)
        if part.received != pixel_bytes or sizes[0] != tail_bytes:
            raise MessageError(
                f"a slice of {pixel_bytes} bytes and a tail of {tail_bytes} came as {part.received} and {sizes[0]}"
            )
        return CopyTail(batch, part)

    def _pixels(self, record: NodeRecord, pixels: messages.Pixels, sizes: Sequence[int]) -> Iterable[Action]:
        record.stir()
        asked = record.asks.get(pixels.id)
        if asked is None:  # late: another node makes this slice now; its Filled counts the duplicate
            return ()
        if record.shared or len(sizes) != 1:
            raise MessageError(f"{len(sizes)} frames came with a piece of a slice, where one or no piece is due")
        batch, part = asked
        end = part.received + sizes[0]
        # Pieces arrive in order. A gap would leave pixels of an earlier batch in the slot.
        if pixels.start != part.received or end > self._bytes_of(part)[0]:
            raise MessageError(
                f"a piece of {sizes[0]} bytes at {pixels.start} does not continue a slice at {part.received}"
            )
        part.received = end
        return [CopyPixels(batch, part, pixels.start)]

    def _bytes_of(self, part: Part) -> tuple[int, int]:
        """Return the bytes of a part's pixels, and of its labels and draws."""
        assert self._run is not None
        return part.count * self._run.pixel_bytes, part.count * self._run.tail_bytes

    def _failed(self, record: NodeRecord, failed: messages.Failed, now: float) -> Iterable[Action]:
        record.stir()
        asked = record.asks.get(failed.id)
        if self._ledger is None or asked is None:  # late, or of an earlier run
            return ()
        if failed.record >= 0:  # -1: a reason other than a record
            judged = self._ledger.refuse(record, failed, now)
            return self._judge(*judged) if judged else ()
        self._ledger.retry(record, failed.id, failed.reason)
        record.failures += 1
        if record.failures < SICK_AFTER and not record.pauses:
            return ()
        pause_s = record.stand_down(now)
        self._release(record)  # other nodes make what it still owes
        return [
            Warn(f"node {record.address} is not asked for {pause_s:.0f} s, since slices fail there: {failed.reason}")
        ]

    def _judge(self, address: str, failed: messages.Failed) -> Iterable[Action]:
        """Exclude a record that no node can read; raise an error if the caller's options do not allow that."""
        assert self._ledger is not None
        error = RecordError(f"{self._split} at {address}", failed.record, failed.reason, failed.source)
        if self._max_bad is None:
            raise error
        self.quarantine.append(Quarantined(error.record, error.source, error.reason))
        bad = len(self._ledger.excluded) + 1  # including those from the state that the run resumed from
        if bad > self._max_bad:
            raise TooManyBadRecords(bad, self._max_bad, str(error))
        self._ledger.exclude(failed.record)
        return [Warn(f"{error} Another takes its place.")]

    # The clock

    def _tick(self, record: NodeRecord, now: float) -> Iterable[Action]:
        """Greet, ping or lose one node."""
        if record.away_since is None and record.state is not NodeState.WORKING:
            record.away_since = now
        if record.state is NodeState.CONNECTING:
            due = now - record.greeted_at > GREET_AGAIN_S and now >= record.back_at
            return [self._greet(record, now)] if due else ()
        silent_s = now - record.heard_at
        if silent_s > defaults.NODE_SILENT_S:
            return self._lose(record, f"it has been silent for {defaults.NODE_SILENT_S:.0f} s")
        # One Ping, not one per tick, while its Pong is on its way.
        if silent_s > defaults.PING_AFTER_S and now - record.pinged_at > defaults.PING_AFTER_S:
            record.pinged_at = now
            return [Send(record.address, messages.Ping())]
        return ()

    def _complain(self, now: float) -> list[Action]:
        """Warn that the client waits for a node, at intervals that double."""
        working = any(record.state is NodeState.WORKING for record in self._nodes.values())
        between_runs = self._ledger is None and self.facts is not None  # nobody waits for a batch then
        if working or between_runs or self._alone_since is None:
            self._alone_since, self._complain_after_s = now, FIRST_COMPLAINT_S
            return []
        alone_s = now - self._alone_since
        if alone_s < self._complain_after_s:
            return []
        self._complain_after_s *= 2
        return [Warn(f"waiting for a node at {', '.join(self._addresses)} ({alone_s:.0f} s so far)")]


# Checks before a node is asked for anything


def check_welcome(
    address: str, welcome: messages.Welcome, split: Split, first: DatasetFacts | None = None
) -> DatasetFacts:
    """Check that a node makes the samples that this client must have, and return the facts of its split.

    Args:
        address: the node's address.
        welcome: the node's answer to Hello.
        split: the split that it must serve.
        first: facts of the first node, which every other must share; None if this is the first.

    Raises:
        NodeRefused: it speaks another protocol, does not serve the split, or would give other bytes.
    """
    check_protocol(address, welcome.protocol)  # first: it explains every other difference
    made = welcome.installation
    if made.golden != BUILTIN_GOLDEN:
        raise NodeRefused(
            address,
            "golden hash of the built-in pictures",
            BUILTIN_GOLDEN,
            made.golden,
            f"it would make other samples, with {made}: install the versions there that constraints.txt names",
        )
    facts = welcome.splits.get(split)
    if facts is None:
        raise NodeRefused(address, "list of splits", split, ", ".join(welcome.splits) or "empty")
    # The fingerprint covers the records, the golden hash the bytes that this node makes of them.
    # The first node is compared with itself; every later one must equal it.
    for what in ("fingerprint", "golden"):
        need, have = getattr(first or facts, what), getattr(facts, what)
        if need != have:
            raise NodeRefused(address, f"dataset's {what}", need, have)
    return facts


def check_protocol(address: str, version: int | None) -> None:
    """Refuse a node of another protocol version; None is the version of a message that states none.

    Raises:
        NodeRefused: it is another.
    """
    if version is not None and version != messages.PROTOCOL:
        raise NodeRefused(
            address,
            "protocol version",
            messages.PROTOCOL,
            version,
            messages.advice(version, messages.PROTOCOL),
        )
