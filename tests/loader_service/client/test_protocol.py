"""Tests of the client's protocol core under every event and fault, without sockets, clocks or threads."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import msgspec
import pytest

from loader_service import defaults
from loader_service.client.plan import Schedule
from loader_service.client.protocol import (
    EXPECT_S,
    FIRST_PAUSE_S,
    GREET_AGAIN_S,
    MAX_FAILURES,
    MAX_PAUSE_S,
    NO_SLOT,
    SICK_AFTER,
    Action,
    Ask,
    ClientProtocol,
    Connect,
    CopyPixels,
    CopyTail,
    Deliver,
    Disconnect,
    Inform,
    NodeState,
    OpenLanes,
    PartState,
    Ready,
    Run,
    Send,
    Standstill,
    Warn,
)
from loader_service.errors import (
    AddressError,
    MessageError,
    NodeFailed,
    NodeFull,
    NodeRefused,
    RecordError,
    SharedMemoryError,
    TooManyBadRecords,
)
from loader_service.types import BUILTIN_GOLDEN, DatasetFacts, EpochAccount, Installation, mean_bytes
from loader_service.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Failed,
    Filled,
    FromNode,
    Hello,
    Ping,
    Pixels,
    Pong,
    Refused,
    SlotLayout,
    UnknownClient,
    Welcome,
)

PATIENCE_S = defaults.NODE_STALL_S
ASKS_PER_WORKER = defaults.ASKS_PER_WORKER
SEGMENT = "loader-service-" + "0" * 32
ATTACH = Attach(SEGMENT, b"n" * 16, SlotLayout(4, 10, 3, 100, 12))
ACCEPTED, FAR_AWAY = Attached(SEGMENT, accepted=True), Attached(SEGMENT, accepted=False, reason="it is far away")
PIXEL_BYTES, TAIL_BYTES = 100, 20  # of one sample
FACTS = DatasetFacts(
    9, ("a",), bytes(mean_bytes(8)), (0.0,) * 3, (1.0,) * 3, (1.0,) * 9, fingerprint="f" * 32, golden="g" * 32
)
WELCOME = Welcome(PROTOCOL, "1" * 32, 1, 1 << 20, Installation(BUILTIN_GOLDEN, {}), {"train": FACTS})


class World:
    """A core, slots whose parts can be blocked, and nodes that answer only when a test has them answer."""

    def __init__(
        self,
        records: int = 20,
        *,
        batch: int = 10,
        slots: int = 4,
        slice_samples: int = 3,
        epochs: int = 1,
        max_bad: int | None = None,
        **run: Any,
    ) -> None:
        self.generations: dict[tuple[int, int], int] = {}
        self.blocked: set[tuple[int, int]] = set()
        self.core = ClientProtocol("client", ("one", "two"), "train", max_bad=max_bad, connections=3)
        self.run = Run(
            schedule=Schedule(records, batch, 0, 1, epochs, False),
            epoch=0,
            position=0,
            slots=slots,
            slice_samples=slice_samples,
            pixel_bytes=PIXEL_BYTES,
            tail_bytes=TAIL_BYTES,
            arm=self.arm,
            **({"attach": ATTACH} | run),
        )
        self.names: set[str] = set()
        self.now = 0.0
        self.asked: list[Ask] = []
        self.held: list[int] = []
        self.delivered: list[tuple[int, int]] = []
        self.standstills: list[Standstill] = []
        self.others: list[Action] = []  # all other actions
        self.carry_out(self.core.begin(self.run))

    def arm(self, slot: int, part: int) -> int | None:
        if (slot, part) in self.blocked:
            return None
        self.generations[slot, part] = self.generations.get((slot, part), 0) + 1
        return self.generations[slot, part]

    @property
    def finished(self) -> bool:
        """True if every position of every epoch was delivered."""
        schedule = self.run.schedule
        assert schedule.epochs is not None
        return len(self.delivered) == schedule.expected() * schedule.epochs

    # Events

    def carry_out(self, actions: Iterable[Action]) -> list[Action]:
        actions = list(actions)
        for action in actions:
            match action:
                case Ask():
                    assert self.generations[action.batch.slot, action.part.index] == action.generation
                    self.asked.append(action)
                case Deliver(batch):
                    assert batch.slot not in self.held, "a slot in the caller's hands was used again"
                    self.held.append(batch.slot)
                    plan = batch.plan
                    self.delivered += [(plan.epoch, i) for i in range(plan.first, plan.first + plan.count)]
                case Standstill():
                    self.standstills.append(action)
                case _:
                    self.others.append(action)
        return actions

    def advance(self) -> list[Action]:
        actions = self.carry_out(self.core.advance(self.now))
        self.check_invariants()
        return actions

    def receive(self, node: str, message: FromNode, lane: int = 0, sizes: Iterable[int] = ()) -> list[Action]:
        actions = self.carry_out(self.core.receive(node, message, self.now, lane, list(sizes)))
        self.check_invariants()
        return actions

    def resolve(self, *names: str) -> list[Action]:
        self.names = set(names)
        return self.carry_out(self.core.resolved(frozenset(names)))

    def node_up(self, node: str, workers: int, *, shared: bool = True) -> None:
        """A node answers Hello and Attach."""
        self.resolve(*self.names, node)
        self.receive(node, msgspec.structs.replace(WELCOME, workers=workers))
        if self.run.transport != "tcp":
            self.receive(node, ACCEPTED if shared else FAR_AWAY)

    def node_down(self, node: str) -> None:
        self.carry_out(self.core.disconnected(node, self.now))

    def tick(self, now: float) -> list[Action]:
        self.now = now
        return self.carry_out(self.core.tick(now))

    def filled(self, node: str, number: int) -> bool:
        """A node says that a slice is complete; False if that is counted as a duplicate."""
        before = self.duplicates
        self.receive(node, Filled(number))
        return self.duplicates == before

    def failed(self, ask: Ask, record: int = -1) -> list[Action]:
        return self.receive(ask.node, Failed(ask.number, record, "it is broken", "a.jpg"))

    def answer(self, index: int = 0) -> bool:
        ask = self.asked.pop(index)
        return self.filled(ask.node, ask.number)

    def let_go(self) -> None:
        while self.held:
            self.core.slot_returned(self.held.pop())

    # State

    @property
    def account(self) -> EpochAccount:
        return self.core.accounts[0]

    @property
    def duplicates(self) -> int:
        return sum(account.duplicates_refused for account in self.core.accounts)

    def state(self, node: str) -> NodeState:
        return self.core._nodes[node].state

    def check_invariants(self) -> None:
        """The invariants of the module's docstring hold after every event."""
        nodes, ledger = self.core._nodes.values(), self.core._ledger
        assert ledger is not None
        assert all(node.state is NodeState.WORKING for node in nodes if node.asks)
        owed = [(number, asked[1]) for node in nodes for number, asked in node.asks.items()]
        parts = [part for batch in ledger._batches for part in batch.parts]
        assert all(part.number == number and part.state is PartState.ASKED for number, part in owed)
        assert len(owed) == sum(part.state is PartState.ASKED for part in parts)
        pending = [batch.slot for batch in ledger._batches if batch.slot != NO_SLOT]
        slots = [*ledger._free, *(slot for slot, _ in ledger._blocked), *pending, *self.core._out]
        assert sorted(slots) == list(range(self.run.slots))
        homeless = [batch for batch in ledger._batches if batch.slot == NO_SLOT]
        assert all(part.state is PartState.WANTED for batch in homeless for part in batch.parts)


# The account: slices, slots, deliveries


def test_batches_come_in_order_and_once_however_answers_come() -> None:
    """Answers in any order give batches in the schedule's order."""
    world, rng = World(57, epochs=2), random.Random(1)
    world.node_up("a", 2)
    while not world.finished:
        world.advance()
        if world.asked:
            assert world.answer(rng.randrange(len(world.asked)))
        world.let_go()
    assert world.delivered == [(e, i) for e in range(2) for i in range(57)]
    assert [(a.expected, a.duplicates_refused, a.reassigned) for a in world.core.accounts] == [(57, 0, 0)] * 2


def test_nothing_is_asked_without_a_slot_or_a_node() -> None:
    """A request is a credit: it needs a node, a free slot, and room in the node's capacity."""
    world = World(200)
    world.advance()
    assert world.asked == []
    world.node_up("a", 1)
    world.advance()
    assert len(world.asked) == ASKS_PER_WORKER
    assert world.core.owed == ASKS_PER_WORKER
    while world.asked:
        world.answer()
        world.advance()
    assert len(world.delivered) == 40  # four slots of ten, all in the caller's hands
    world.let_go()
    world.advance()
    assert world.asked


def test_a_lost_nodes_slices_are_asked_of_another() -> None:
    """The slices that a lost node owes are asked of another under new numbers; its late answers are duplicates."""
    world = World(20)
    world.node_up("a", 4)
    world.advance()
    old = list(world.asked)
    world.asked.clear()
    world.node_up("b", 4)
    world.node_down("a")
    world.advance()
    assert {ask.node for ask in world.asked} == {"b"}
    assert not {ask.number for ask in old} & {ask.number for ask in world.asked}
    assert {(a.part.first, a.part.count) for a in world.asked} == {(a.part.first, a.part.count) for a in old}
    assert not any(world.filled(ask.node, ask.number) for ask in old)
    assert world.account.reassigned == len(old)
    assert world.account.duplicates_refused == len(old)


def test_an_answer_counts_once() -> None:
    """The second answer to one request is refused and counted."""
    world = World(10)
    world.node_up("a", 4)
    world.node_up("b", 4)
    world.advance()
    first = world.asked[0]
    assert world.filled(first.node, first.number)
    assert not world.filled(first.node, first.number)
    assert not world.filled("b" if first.node == "a" else "a", first.number)
    assert world.account.duplicates_refused == 2


def test_a_bad_record_is_judged_only_when_every_node_refused_it() -> None:
    """A part goes to the nodes that have not refused it; when all have, its record is excluded and it is asked for again."""
    world = World(3, max_bad=1)
    world.node_up("a", 1)
    world.node_up("b", 1)
    world.advance()
    (first,) = world.asked
    assert world.failed(first, record=17) == []
    world.advance()
    second = world.asked[1]
    assert second.node != first.node
    (warning,) = world.failed(second, record=17)
    assert isinstance(warning, Warn)
    assert warning.text.startswith("record 17 (a.jpg) of train at ")
    assert warning.text.endswith("it is broken. Another takes its place.")
    assert world.failed(second, record=18) == []  # nobody waits for this answer any more
    assert world.core.excluded == (17,)
    assert [(q.record, q.source, q.reason) for q in world.core.quarantine] == [(17, "a.jpg", "it is broken")]
    world.advance()
    third = world.asked[2]
    assert third.part.excluded == (17,)
    assert world.filled(third.node, third.number)


def test_the_first_node_to_answer_does_not_judge_alone() -> None:
    """A node that was just found is waited for before a record is called bad; it may read the record."""
    world = World(3, max_bad=1)
    world.resolve("a", "b")
    world.node_up("a", 1)
    world.tick(0.0)
    world.advance()
    ask = world.asked.pop()
    assert world.failed(ask, record=1) == []
    world.advance()
    assert world.asked == []
    world.node_up("b", 1)
    world.advance()
    (again,) = world.asked
    assert again.node == "b"
    assert world.filled("b", again.number)
    assert world.core.excluded == ()


def test_a_node_without_any_disk_does_not_have_good_records_replaced() -> None:
    """Of two nodes that name different records, the one that refuses less is believed; the other's record is read after all."""
    world = World(10, slice_samples=3, max_bad=1)
    world.node_up("sound", 1)
    world.node_up("without", 1)  # asked second, so that its refusal of the first slice is the last one
    warnings: list[Action] = []
    while not world.finished:
        world.advance()
        ask = max(world.asked, key=lambda ask: ask.node, default=None)  # the one without a disk answers at once
        if ask is None:
            break
        world.asked.remove(ask)
        if ask.node == "without":
            warnings += world.failed(ask, record=ask.part.first)
        elif ask.part.first == 0 and not ask.part.excluded:
            warnings += world.failed(ask, record=2)  # the one record that no node can read
        else:
            assert world.filled(ask.node, ask.number)
    assert world.core.excluded == (2,)
    assert len([warning for warning in warnings if isinstance(warning, Warn)]) == 1
    assert len(world.delivered) == 10


def test_a_node_that_does_not_come_is_not_waited_for_again_and_again() -> None:
    """Once a node has been away for EXPECT_S, the others judge each further record at once."""
    world = World(6, slice_samples=3, max_bad=2)
    world.resolve("a", "b")
    world.node_up("a", 1)
    world.tick(0.0)
    world.tick(EXPECT_S)
    world.advance()
    first, second = world.asked
    world.failed(first, record=1)
    world.failed(second, record=4)
    assert world.core.excluded == (1, 4)


def test_a_part_refused_by_all_that_are_left_is_asked_again() -> None:
    """If the only node that has not refused a part is lost for a while, the others are asked again, and their refusal counts."""
    world = World(3, max_bad=1)
    world.node_up("a", 1)
    world.node_up("b", 1)
    world.advance()
    ask = world.asked.pop()
    assert world.failed(ask, record=1) == []
    world.node_down("b" if ask.node == "a" else "a")
    world.tick(0.0)
    world.advance()
    assert world.asked == []  # it may come back
    world.tick(EXPECT_S)
    world.advance()
    again = world.asked.pop()
    assert again.node == ask.node
    world.failed(again, record=1)
    assert world.core.excluded == (1,)


def test_a_record_is_judged_once_for_all_parts() -> None:
    """A refusal of a record that is excluded already only has its part asked for again."""
    world = World(6, slice_samples=3, max_bad=1)
    world.node_up("a", 1)
    world.advance()
    first, second = world.asked
    world.failed(first, record=4)
    assert world.failed(second, record=4) == []
    assert world.core.excluded == (4,)


def test_a_bad_record_ends_a_run_that_may_replace_none() -> None:
    """The error names the record, its source, the node and the reason."""
    world = World(3)
    world.node_up("a", 1)
    world.advance()
    with pytest.raises(RecordError, match=r"record 17 \(a.jpg\) of train at a cannot be used: it is broken"):
        world.failed(world.asked[0], record=17)


def test_a_bad_record_too_many_ends_the_run() -> None:
    """Records that a resumed run brought along count."""
    world = World(3, max_bad=1, excluded=(2,))
    world.node_up("a", 1)
    world.advance()
    assert world.asked[0].part.excluded == (2,)
    with pytest.raises(TooManyBadRecords, match="2 records are bad, and max_bad allows 1"):
        world.failed(world.asked[0], record=1)
    assert [q.record for q in world.core.quarantine] == [1]


def test_a_slice_that_every_node_fails_again_and_again_ends_the_run() -> None:
    """A failure that names no record has the slice tried again after a pause that doubles, but not without limit."""
    world = World(3)
    world.node_up("a", 1)
    world.node_up("b", 1)
    ended = ""
    for _ in range(2 * MAX_FAILURES):
        world.now += MAX_PAUSE_S
        world.advance()
        (ask,) = world.asked
        world.asked.clear()
        try:
            world.failed(ask)
        except NodeFailed as error:
            ended = str(error)
    assert (
        f"no node could make positions 0 to 2 of epoch 0, each tried {MAX_FAILURES} times: at a: it is broken; "
        in ended
    )
    assert "at b: it is broken" in ended
    assert world.account.reassigned == 2 * MAX_FAILURES


def test_a_sick_node_is_stood_down_and_the_others_serve() -> None:
    """A node that refuses at once gets SICK_AFTER requests and then none until its pause ends; the run never notices."""
    world = World(3000, slice_samples=1, slots=4)
    world.node_up("sick", 1)
    world.node_up("well", 1)
    failed = 0
    while len(world.delivered) < 1000:
        world.advance()
        ask = next((ask for ask in world.asked if ask.node == "sick"), world.asked[0])  # it is the faster one
        world.asked.remove(ask)
        if ask.node == "sick":
            failed += 1
            world.failed(ask)
            world.asked = [other for other in world.asked if other.node == "well" or world.core._nodes["sick"].asks]
        else:
            assert world.filled(ask.node, ask.number)
        world.let_go()
    assert failed == SICK_AFTER
    assert (
        Warn(f"node sick is not asked for {FIRST_PAUSE_S:.0f} s, since slices fail there: it is broken") in world.others
    )


def test_a_sick_node_is_asked_for_one_slice_after_each_pause() -> None:
    """The pause doubles up to MAX_PAUSE_S; a slice that comes makes the node well, and it is asked for as many as before."""
    world = World(3000, slice_samples=1, slots=9)
    world.node_up("sick", 2)
    world.node_up("well", 1)
    world.advance()
    for ask in [ask for ask in world.asked if ask.node == "sick"][:SICK_AFTER]:
        world.failed(ask)
    world.asked = [ask for ask in world.asked if ask.node == "well"]
    pause_s = FIRST_PAUSE_S
    for _ in range(MAX_FAILURES):
        world.now += 0.9 * pause_s
        world.advance()
        assert {ask.node for ask in world.asked} == {"well"}
        world.now += 0.2 * pause_s
        world.advance()
        probe = world.asked.pop()
        assert probe.node == "sick"
        world.failed(probe)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
    world.now += pause_s
    world.advance()
    probe = world.asked.pop()
    assert probe.node == "sick"
    assert world.filled("sick", probe.number)
    assert world.others[-1] == Inform("node sick serves again")
    world.advance()
    assert sum(ask.node == "sick" for ask in world.asked) == 2 * ASKS_PER_WORKER


def test_a_node_whose_pause_is_over_is_asked_although_the_others_are_idle() -> None:
    """The next slice that it has not failed goes to it, whatever the order of addresses."""
    world = World(3000, slice_samples=1, slots=1, batch=1)
    world.node_up("a", 9)
    world.node_up("sick", 1)
    world.core._nodes["sick"].stand_down(0.0)
    world.now = FIRST_PAUSE_S
    world.advance()
    assert [ask.node for ask in world.asked] == ["sick"]


def test_a_node_that_may_come_back_keeps_a_failing_run_alive() -> None:
    """A lost node has not failed the slice, so the run waits for it; a refused one does not count."""
    world = World(3)
    world.node_up("a", 1)
    world.node_up("b", 1)
    world.node_down("b")
    for _ in range(3 * MAX_FAILURES):
        world.now += MAX_PAUSE_S
        world.advance()
        world.failed(world.asked.pop())
    world.receive("b", Refused(PROTOCOL, "it is full"))
    world.now += MAX_PAUSE_S
    world.advance()
    with pytest.raises(NodeFailed, match="no node could make"):
        world.failed(world.asked.pop())


def test_a_blocked_slot_is_left_and_taken_back_later() -> None:
    """A batch leaves a slot of which a late writer holds a part; the slot is used again once it is free."""
    world = World(40, slots=2)
    world.node_up("a", 9)
    world.blocked.add((0, 1))
    world.advance()
    assert {ask.batch.slot for ask in world.asked if ask.batch.plan.start == 0 and ask.batch.slot != 0} <= {1}
    while len(world.delivered) < 20:
        if world.asked:
            world.answer()
        world.advance()
        world.let_go()
    assert world.delivered[:20] == [(0, i) for i in range(20)]
    world.blocked.clear()
    used = set()
    while not world.finished:
        world.advance()
        used |= {ask.batch.slot for ask in world.asked}
        if world.asked:
            world.answer()
        world.let_go()
    assert world.delivered == [(0, i) for i in range(40)]
    assert used == {0, 1}


def test_when_all_slots_are_blocked_it_waits_and_loses_nothing() -> None:
    """Nothing is asked for while no slot can be armed; afterwards everything is delivered."""
    world = World(30, slots=3)
    world.node_up("a", 9)
    world.blocked = {(slot, part) for slot in range(3) for part in range(4)}
    for _ in range(5):
        world.advance()
    assert world.asked == []
    assert world.delivered == []
    world.blocked.clear()
    while not world.finished:
        world.advance()
        if world.asked:
            world.answer()
        world.let_go()
    assert world.delivered == [(0, i) for i in range(30)]


def test_a_new_run_starts_from_the_slots_that_are_free() -> None:
    """Slots in the caller's hands stay out, and answers to the old run's requests are duplicates in the new one."""
    world = World(40, slots=3)
    world.node_up("a", 9)
    world.advance()
    old = world.asked
    for ask in [ask for ask in old if ask.batch.plan.start == 0]:
        world.filled(ask.node, ask.number)
    world.advance()
    assert len(world.held) == 1
    late = [ask for ask in old if ask.batch.plan.start == 10]
    world.asked = []
    world.carry_out(world.core.begin(world.run))
    world.advance()
    assert {ask.batch.plan.start for ask in world.asked} == {0, 10}
    assert not {ask.batch.slot for ask in world.asked} & set(world.held)
    assert not any(world.filled(ask.node, ask.number) for ask in late)
    assert all(world.answer() for _ in range(len(world.asked)))


# Standstill


def test_a_node_that_stands_still_is_reported_and_relieved() -> None:
    """It is reported once; others make what it owes, and it is asked for nothing more until it gives something again."""
    world = World(200, slots=2)
    world.node_up("mute", 2)
    world.advance()
    owed, world.asked = world.asked, []
    world.node_up("good", 9)
    world.now = PATIENCE_S - 1
    world.advance()
    assert world.standstills == []
    assert world.asked
    assert len(owed) == 2 * ASKS_PER_WORKER
    while world.asked:
        world.answer()
    world.now += 2
    world.advance()
    (report,) = world.standstills
    assert (report.node, report.owed, report.still_s) == ("mute", len(owed), PATIENCE_S + 1)
    assert (report.oldest, report.oldest_s, report.elsewhere) == (owed[0].part, PATIENCE_S + 1, True)
    assert "owes 6 slices, the oldest (positions 0 to 2) for 31 s; the next batch, at position 0" in str(report)
    assert str(report).endswith("other nodes are asked instead")
    assert {ask.node for ask in world.asked} == {"good"}
    assert {ask.part.first for ask in owed} <= {ask.part.first for ask in world.asked}
    while len(world.delivered) < 60:
        world.answer()
        world.let_go()
        world.advance()
        assert {ask.node for ask in world.asked} <= {"good"}
    assert not world.filled("mute", owed[0].number)
    world.let_go()
    while world.asked:
        world.answer()
    world.advance()
    assert "mute" in {ask.node for ask in world.asked}
    assert len(world.standstills) == 1


def test_a_node_that_stands_still_is_waited_for_if_it_is_the_only_one() -> None:
    """It is reported once and keeps what it owes, until another node comes."""
    world = World(20)
    world.node_up("mute", 1)
    world.advance()
    for _ in range(5):
        world.now += PATIENCE_S
        world.advance()
    (report,) = world.standstills
    assert str(report).endswith("there is no other node to ask")
    assert {ask.node for ask in world.asked} == {"mute"}
    owed, world.asked = world.asked, []
    world.node_up("new", 9)
    world.advance()
    assert {ask.part.first for ask in owed} <= {ask.part.first for ask in world.asked}
    assert {ask.node for ask in world.asked} == {"new"}
    assert len(world.standstills) == 1


def test_a_node_that_is_slow_is_left_alone() -> None:
    """A node that gives a piece, a slice or a failure now and then does not stand still, nor does one that owes nothing."""
    world = World(10, slice_samples=10, attach=None)
    world.node_up("slow", 1)
    world.node_up("wait", 1)
    world.advance()
    (ask,) = world.asked
    for piece in range(10):
        world.now += PATIENCE_S * 0.9
        (action,) = world.receive(ask.node, Pixels(ask.number, piece * PIXEL_BYTES), sizes=[PIXEL_BYTES])
        assert isinstance(action, CopyPixels)
        world.advance()
    assert world.standstills == []
    world.now += PATIENCE_S * 0.9
    world.failed(ask)
    world.advance()
    assert world.standstills == []


def test_a_record_is_judged_without_a_node_that_stands_still() -> None:
    """A record is excluded when every node that can be asked has refused it; one that stands still cannot be asked."""
    world = World(6, batch=3, slots=2, max_bad=1)
    for name in ("a", "b"):
        world.node_up(name, 1)
    world.advance()
    mute, good = sorted(world.asked, key=lambda ask: ask.node)
    world.now = PATIENCE_S - 1
    world.receive(good.node, Pixels(0, 0))  # for nobody, but a sign that it moves
    world.advance()
    world.now = PATIENCE_S + 1
    world.advance()
    assert [report.node for report in world.standstills] == [mute.node]
    world.failed(good, record=5)
    assert world.core.excluded == (5,)


# The handshake


def test_a_node_is_greeted_until_it_answers_and_then_attached() -> None:
    """Connect, Hello, Welcome, Attach, Attached, and slices are asked for in shared memory."""
    world = World()
    assert world.resolve("a") == [Connect("a")]
    assert world.tick(1.0) == [Send("a", Hello(PROTOCOL, "client"))]  # before there is a connection
    assert world.carry_out(world.core.connected("a", 1.5)) == [Send("a", Hello(PROTOCOL, "client"))]
    assert Send("a", Hello(PROTOCOL, "client")) not in world.tick(1.5 + GREET_AGAIN_S)
    assert Send("a", Hello(PROTOCOL, "client")) in world.tick(1.6 + GREET_AGAIN_S)
    assert world.receive("a", WELCOME) == [Ready(), Send("a", ATTACH)]
    assert (world.core.facts, world.core.slot_bytes, world.core.workers) == (FACTS, 1 << 20, 1)
    assert world.advance() == []
    assert world.receive("a", ACCEPTED) == []
    world.advance()
    assert {(ask.node, ask.instance, ask.shared, ask.lane) for ask in world.asked} == {("a", "1" * 32, True, 0)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"protocol": PROTOCOL + 1},
            f"protocol version is {PROTOCOL + 1}, this client needs {PROTOCOL}; the client is older",
        ),
        ({"protocol": PROTOCOL - 1}, "; the node is older: upgrade it first"),
        (
            {"installation": Installation("0" * 32, {"numpy": "9.9"})},
            f"this client needs {BUILTIN_GOLDEN}; .*numpy 9.9",
        ),
        ({"splits": {"val": FACTS}}, "list of splits is val, this client needs train"),
        ({"splits": {"train": msgspec.structs.replace(FACTS, fingerprint="e" * 32)}}, "dataset's fingerprint is eee"),
        ({"splits": {"train": msgspec.structs.replace(FACTS, golden="e" * 32)}}, "dataset's golden is eee"),
        ({"slot_bytes": 1000}, "send slot is 1000 bytes, this client needs 1048576 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_node_that_would_give_other_bytes_is_refused(change: dict[str, Any], sentence: str) -> None:
    """A second node must agree with the first in everything that decides or bounds the bytes; the first goes on alone."""
    world = World()
    world.node_up("a", 1)
    world.resolve("a", "b")
    (warning,) = world.receive("b", msgspec.structs.replace(WELCOME, **change))
    assert isinstance(warning, Warn)
    assert re.search(f"the node at b is refused: .*{sentence}", warning.text)
    world.advance()
    assert {ask.node for ask in world.asked} == {"a"}


def test_the_last_refusal_is_the_error() -> None:
    """A client ends when each of its addresses is refused, and not before."""
    world = World()
    world.resolve("a", "b")
    other = msgspec.structs.replace(WELCOME, installation=Installation("0" * 32, {}))
    assert isinstance(world.receive("a", other)[0], Warn)
    with pytest.raises(NodeFull, match=r"the node at b is full: it has 256 clients; wait until"):
        world.receive("b", Refused(PROTOCOL, "it has 256 clients"))


def test_a_refused_node_is_greeted_again_after_a_pause() -> None:
    """Its reason is logged once; when it takes the client, it serves."""
    world = World()
    world.node_up("a", 1)
    world.resolve("a", "b")
    full = Refused(PROTOCOL, "it has 256 clients")
    hello = Send("b", Hello(PROTOCOL, "client"))
    assert len(world.receive("b", full)) == 1
    assert world.carry_out(world.core.connected("b", 0.1)) == []
    assert hello not in world.tick(0.9 * FIRST_PAUSE_S)
    world.receive("a", Pong())
    assert hello in world.tick(GREET_AGAIN_S + 0.1)
    assert world.receive("b", full) == []
    assert hello not in world.tick(GREET_AGAIN_S + 1.9)
    world.node_up("b", 1)
    world.advance()
    assert {ask.node for ask in world.asked} == {"a", "b"}


@pytest.mark.parametrize("error", [AddressError("b", "a web server listens there"), MessageError("odd")])
def test_what_is_no_node_is_stood_down(error: Any) -> None:
    """Rubbish at one address, however it is noticed, leaves the other in use; at the only address it is the error."""
    world, alone = World(), ClientProtocol("client", ("b",), "train")
    world.node_up("a", 1)
    world.resolve("a", "b")
    alone.resolved(frozenset("b"))
    for core in (world.core, alone):
        report = core.malformed if isinstance(error, MessageError) else core.refuse
        if core is alone:
            with pytest.raises(type(error)):
                report("b", error, 1.0)
        else:
            (warning,) = report("b", error, 1.0)
            assert "b" in str(warning)
            assert list(report("b", error, 1.5)) == []
    world.advance()
    assert {ask.node for ask in world.asked} == {"a"}


def test_a_message_of_another_protocol_version_is_refused() -> None:
    """A message that cannot be read loses its node; if it states another version, that is the error."""
    world = World()
    world.core = ClientProtocol("client", ("a",), "train")
    world.carry_out(world.core.begin(world.run))
    world.node_up("a", 1)
    error = MessageError("it is odd")
    world.carry_out(world.core.malformed("a", error, 0.0, PROTOCOL))
    assert world.others[-2:] == [Warn(f"node a: {error}"), Warn("node a is lost: it does not speak this protocol")]
    assert world.state("a") is NodeState.CONNECTING
    with pytest.raises(NodeRefused, match="the client is older"):
        world.core.malformed("a", error, MAX_PAUSE_S, PROTOCOL + 1)


def test_a_node_that_cannot_attach_sends_frames() -> None:
    """The client says so, and opens its lanes."""
    world = World()
    world.resolve("a")
    world.receive("a", WELCOME)
    text = "node a cannot share memory with this client, so slices come in frames: it is far away"
    assert world.receive("a", FAR_AWAY) == [Inform(text), OpenLanes("a", 3)]
    world.advance()
    assert {ask.shared for ask in world.asked} == {False}


def test_forced_shared_memory_that_a_node_cannot_have_is_an_error() -> None:
    """With the transport ``shm``, a node that does not accept the segment ends the run, with its reason."""
    world = World(transport="shm")
    world.resolve("a")
    world.receive("a", WELCOME)
    with pytest.raises(
        SharedMemoryError, match=r"the node at a cannot share memory with this client \(it is far away\)"
    ):
        world.receive("a", FAR_AWAY)


def test_an_answer_about_another_segment_changes_nothing() -> None:
    """A late answer to an earlier Attach is ignored."""
    world = World()
    world.resolve("a")
    world.receive("a", WELCOME)
    assert world.receive("a", Attached(SEGMENT.replace("0", "1"), accepted=True)) == []
    assert world.state("a") is NodeState.WELCOMED


@pytest.mark.parametrize("run", [{"transport": "tcp"}, {"attach": None}], ids=str)
def test_without_shared_memory_nothing_is_attached(run: dict[str, Any]) -> None:
    """A run over TCP, or one whose slots have no name, begins right after the Welcome."""
    world = World(**run)
    world.resolve("a")
    assert world.receive("a", WELCOME) == [Ready(), OpenLanes("a", 3)]
    assert world.state("a") is NodeState.WORKING


def test_a_welcomed_node_works_once_a_run_begins() -> None:
    """Without a run a node is welcomed and no more; a later run has it work without another handshake."""
    world, core = World(), ClientProtocol("client", ("a",), "train")
    core.resolved(frozenset("a"))
    assert core.receive("a", WELCOME, 0.0) == [Ready()]
    assert core.receive("a", Filled(1), 0.0) == ()
    assert core.receive("a", ACCEPTED, 0.0) == ()
    assert core.begin(world.run) == [Send("a", ATTACH)]
    assert core.receive("a", ACCEPTED, 0.0) == ()
    assert core.begin(world.run) == []
    assert core._nodes["a"].state is NodeState.WORKING


def test_a_node_that_reconnects_is_asked_again() -> None:
    """A second Welcome means that requests may be lost: all of them are made again, of the instance that is there now."""
    world = World(20)
    world.node_up("a", 1)
    world.advance()
    old, world.asked = world.asked, []
    other = msgspec.structs.replace(WELCOME, instance="2" * 32, workers=2)
    assert world.receive("a", other) == [Send("a", ATTACH)]
    assert world.state("a") is NodeState.WELCOMED
    world.advance()
    assert world.asked == []
    world.receive("a", ACCEPTED)
    world.advance()
    assert {ask.instance for ask in world.asked} == {"2" * 32}
    assert len(world.asked) == 2 * ASKS_PER_WORKER
    assert {ask.part.first for ask in old} <= {ask.part.first for ask in world.asked}
    assert not any(world.filled(ask.node, ask.number) for ask in old)


def test_a_node_that_does_not_know_this_client_is_greeted_at_once() -> None:
    """UnknownClient means that the node was restarted: it is lost, greeted and asked again."""
    world = World()
    world.node_up("a", 1)
    world.advance()
    assert world.receive("a", UnknownClient()) == [
        Warn("node a is lost: it does not know this client (any more)"),
        Send("a", Hello(PROTOCOL, "client")),
    ]
    assert world.state("a") is NodeState.CONNECTING
    assert world.account.reassigned == ASKS_PER_WORKER
    assert world.receive("a", UnknownClient()) == []  # it was greeted already


def test_signs_of_life() -> None:
    """A Ping is answered, a Pong is not, and messages of nodes that are gone are ignored."""
    world = World()
    world.node_up("a", 1)
    assert world.receive("a", Ping()) == [Send("a", Pong())]
    assert world.receive("a", Pong()) == []
    assert world.receive("elsewhere", Ping()) == []
    assert list(world.core.connected("elsewhere", 0.0)) == []
    assert list(world.core.disconnected("elsewhere", 0.0)) == []
    assert list(world.core.malformed("elsewhere", MessageError("odd"), 0.0)) == []
    assert list(world.core.refuse("elsewhere", MessageError("odd"), 0.0)) == []


def test_a_quiet_node_is_pinged_and_a_silent_one_is_lost() -> None:
    """Any message is a sign of life."""
    world = World()
    world.node_up("a", 1)
    world.advance()
    assert world.tick(defaults.PING_AFTER_S) == []
    assert world.tick(1.1 * defaults.PING_AFTER_S) == [Send("a", Ping())]
    assert world.tick(1.2 * defaults.PING_AFTER_S) == []
    world.now = 5.0
    world.receive("a", Pong())
    assert world.tick(5.0 + defaults.NODE_SILENT_S) == [Send("a", Ping())]
    late = 5.1 + defaults.NODE_SILENT_S
    assert world.tick(late) == [Warn("node a is lost: it has been silent for 10 s")]
    assert world.core.owed == 0
    assert world.tick(late + 0.1) == [Send("a", Hello(PROTOCOL, "client"))]


def test_waiting_without_a_node_is_logged_at_growing_intervals() -> None:
    """The client warns after 2 s, 4 s, 8 s without a working node, and begins again when one was there."""
    world = World()
    lines = [action for second in range(10) for action in world.tick(float(second))]
    assert lines == [Warn(f"waiting for a node at one, two ({second} s so far)") for second in (2, 4, 8)]
    world.node_up("a", 1)
    assert world.tick(10.0) == []
    world.node_down("a")
    assert [action for action in world.tick(12.0) if isinstance(action, Warn)] == [
        Warn("waiting for a node at one, two (2 s so far)")
    ]


def test_a_client_between_runs_does_not_warn() -> None:
    """A client that has been welcomed and has no run does not complain."""
    core = ClientProtocol("client", ("one",), "train")
    core.resolved(frozenset("a"))
    core.receive("a", WELCOME, 0.0)
    assert not any(isinstance(action, Warn) for second in range(9) for action in core.tick(float(second)))


def test_a_node_whose_address_disappears_is_disconnected_once_it_is_lost() -> None:
    """A node whose address is no longer found stays connected while it works."""
    world = World()
    world.resolve("a", "b")
    world.node_up("a", 1)
    assert world.resolve() == [Disconnect("b")]
    world.advance()
    assert {ask.node for ask in world.asked} == {"a"}
    assert world.receive("a", UnknownClient()) == [
        Warn("node a is lost: it does not know this client (any more)"),
        Disconnect("a"),
    ]
    assert world.receive("a", WELCOME) == []
    assert world.resolve("a") == [Connect("a")]


# Frames


def frames_world(**options: Any) -> tuple[World, Ask]:
    """A node that sends frames, and its request for one slice of two samples."""
    world = World(2, slots=1, transport="tcp", **options)
    world.node_up("a", 1)
    world.advance()
    (ask,) = world.asked
    return world, ask


def test_pieces_go_where_they_belong() -> None:
    """Each piece is copied to where the last one ended, then labels and draws; only then is the batch delivered."""
    world, ask = frames_world()
    assert world.receive("a", Pixels(ask.number, 0), sizes=[150]) == [CopyPixels(ask.batch, ask.part, 0)]
    assert world.receive("a", Pixels(ask.number, 150), sizes=[50]) == [CopyPixels(ask.batch, ask.part, 150)]
    world.advance()
    assert world.delivered == []
    assert world.receive("a", Filled(ask.number), sizes=[2 * TAIL_BYTES]) == [CopyTail(ask.batch, ask.part)]
    assert world.advance() == [Deliver(ask.batch)]


def test_pieces_of_other_requests_change_nothing() -> None:
    """Pieces and ends of a request that is not current are ignored; the end counts as a duplicate."""
    world, ask = frames_world()
    assert world.receive("a", Pixels(ask.number + 1, 0), sizes=[7]) == []
    assert world.receive("a", Filled(ask.number + 1), sizes=[7]) == []
    assert world.duplicates == 1
    assert ask.part.received == 0


@pytest.mark.parametrize(
    "pieces",
    [
        [(150, [50])],
        [(0, [150]), (0, [150])],
        [(0, [201])],
        [(0, [100, 100])],
        [(0, [])],
        [(0, [150]), (None, [40])],
        [(None, [40])],
        [(0, [200]), (None, [41])],
        [(0, [200]), (None, [40, 0])],
        [(0, [200]), (None, [])],
    ],
    ids=[
        "a gap",
        "a piece twice",
        "more than a slice",
        "two frames",
        "no frame",
        "pixels missing",
        "no pixels",
        "a tail of another size",
        "two tails",
        "no tail",
    ],
)
def test_pieces_that_are_not_due_lose_their_node(pieces: list[tuple[int | None, list[int]]]) -> None:
    """Nothing of the last message is copied, no batch is made of it, and the slice is wanted again."""
    world, ask = frames_world()
    *good, last = [Filled(ask.number) if start is None else Pixels(ask.number, start) for start, _ in pieces]
    for message, (_, sizes) in zip(good, pieces, strict=False):
        world.receive("a", message, sizes=sizes)
    flaw, lost = world.receive("a", last, sizes=pieces[-1][1])
    assert isinstance(flaw, Warn)
    assert flaw.text.startswith("node a: a message breaks the protocol: ")
    assert lost == Warn("node a is lost: it does not speak this protocol")
    assert ask.part.state is PartState.WANTED
    world.advance()
    assert world.delivered == []


@pytest.mark.parametrize("message", [Filled, lambda number: Pixels(number, 0)], ids=["Filled", "Pixels"])
def test_frames_from_a_node_that_shares_memory_lose_it(message: Any) -> None:
    """A slice that was requested in shared memory must not come in frames."""
    world = World()
    world.node_up("a", 1)
    world.advance()
    ask = world.asked[0]
    *_, lost = world.receive("a", message(ask.number), sizes=[ask.part.count * TAIL_BYTES])
    assert lost == Warn("node a is lost: it does not speak this protocol")
    assert ask.part.state is PartState.WANTED


def test_slices_take_the_lanes_that_are_open_in_turn() -> None:
    """A lane is used once the node has answered by it, since before that the node cannot send there."""
    world = World(200, slice_samples=1, transport="tcp")
    world.node_up("a", 2)
    assert OpenLanes("a", 3) in world.others
    world.advance()
    assert {ask.lane for ask in world.asked} == {0}
    assert list(world.core.connected("a", 0.0, 2)) == [Send("a", Ping(), 2)]
    world.receive("a", Pong(), lane=2)
    world.receive("a", Pong(), lane=1)
    world.node_up("b", 2)
    world.asked.clear()
    world.node_down("b")
    world.receive("a", UnknownClient())
    world.node_up("a", 2)
    world.advance()
    assert sorted(ask.lane for ask in world.asked) == [0, 0, 1, 1, 2, 2]


def test_a_lane_that_is_cut_resets_its_node() -> None:
    """Slices may have been on their way by it, so all that the node owes is asked for again, without that lane."""
    world = World(200, slice_samples=1, transport="tcp")
    world.node_up("a", 2)
    assert list(world.core.disconnected("a", 0.0, 1)) == []  # it was not open yet
    world.receive("a", Pong(), lane=1)
    world.advance()
    assert {ask.lane for ask in world.asked} == {0, 1}
    assert world.carry_out(world.core.disconnected("a", 0.0, 1)) == [
        Warn("node a is lost: one of its connections was cut"),
        Send("a", Hello(PROTOCOL, "client")),
    ]
    assert world.account.reassigned == len(world.asked)
    world.asked.clear()
    world.node_up("a", 2)
    world.advance()
    assert {ask.lane for ask in world.asked} == {0}


def test_an_ended_run_leaves_nothing_to_do() -> None:
    """After an error there is no account and no action, and answers are ignored."""
    world, ask = frames_world()
    world.core.end()
    assert world.core.advance(0.0) == []
    assert (world.core.accounts, world.core.pending, world.core.excluded) == ([], 0, None)
    assert list(world.core.receive("a", Filled(ask.number), 0.0, 0, [1])) == []
    assert list(world.core.receive("a", Failed(ask.number, -1, "broken"), 0.0)) == []
    world.core.slot_returned(0)


# Everything at once


@pytest.mark.parametrize("seed", range(60))
def test_exactly_once_under_random_faults(seed: int) -> None:
    """Under random faults every position is delivered once and in order, and the invariants hold.

    Nodes come, go, reconnect and stand still; answers are late, doubled or failures; parts of slots are blocked.
    """
    rng = random.Random(seed)
    records = rng.randrange(1, 150)
    world = World(records, batch=rng.randrange(1, 20), slots=rng.randrange(2, 6), slice_samples=rng.randrange(1, 8), epochs=2)  # fmt: skip
    answered: list[Ask] = []
    alive: set[str] = set()
    for step in count():
        calm = step > 3000  # faults end, so that the run can
        world.now += rng.choice((0.0, 0.0, 0.0, PATIENCE_S / 3))
        world.advance()
        if world.finished:
            break
        event = rng.random()
        if event < 0.05 or (calm and not alive):
            name = rng.choice("abc")
            alive.add(name)
            world.node_up(name, rng.randrange(1, 4))
        elif event < 0.08 and alive and not calm:
            name = alive.pop()
            world.node_down(name)
            if rng.random() < 0.5:  # half of the lost answers arrive after all, when nobody waits for them
                answered += [ask for ask in world.asked if ask.node == name]
            world.asked = [ask for ask in world.asked if ask.node != name]
        elif event < 0.12 and not calm:
            world.blocked.add((rng.randrange(6), rng.randrange(4)))
        elif event < 0.2 or calm:
            world.blocked.clear()
        elif event < 0.25 and answered:
            duplicate = rng.choice(answered)
            world.filled(duplicate.node, duplicate.number)
        elif event < 0.28 and world.asked:
            world.failed(world.asked.pop(rng.randrange(len(world.asked))))
        if world.asked and rng.random() < 0.8:
            ask = world.asked.pop(rng.randrange(len(world.asked)))
            answered.append(ask)
            world.filled(ask.node, ask.number)
        if rng.random() < 0.5:
            world.let_go()
    assert world.delivered == [(e, i) for e in range(2) for i in range(records)]


def test_a_run_that_continues_keeps_the_accounts() -> None:
    """After a break, the accounts of earlier epochs stay; that of an epoch begun anew expects it whole and adds its events."""
    world = World(30, epochs=3)
    world.node_up("a", 1)
    world.advance()
    world.node_down("a")
    before = world.account
    assert before.reassigned > 0
    world.core.begin(replace(world.run, epoch=0, position=20, continues=True))
    world.core.advance(0.0)
    assert (world.account.expected, world.account.reassigned) == (10, before.reassigned)
    world.core.begin(replace(world.run, epoch=1, continues=True))
    world.core.advance(0.0)
    assert [(account.epoch, account.expected) for account in world.core.accounts][:2] == [(0, 10), (1, 30)]
    world.core.begin(world.run)
    assert world.core.accounts == []
