"""The ledger under everything that can happen, without a socket or a clock."""

from __future__ import annotations

import itertools
import random

import pytest

from loader_service.client.actions import Ask, Deliver, Finish, Standstill
from loader_service.client.ledger import ASKS_PER_WORKER, Ledger
from loader_service.client.plan import Schedule

PATIENCE_S = 30.0


class World:
    """Slots whose parts can be blocked, and nodes that answer when told to."""

    def __init__(
        self, records: int, *, batch: int = 10, slots: int = 4, slice_samples: int = 3, epochs: int = 1
    ) -> None:
        self.generations: dict[tuple[int, int], int] = {}
        self.blocked: set[tuple[int, int]] = set()
        self.ledger = Ledger(
            Schedule(records, batch, 0, 1, epochs, False),
            0,
            0,
            slots=list(range(slots)),
            slice_samples=slice_samples,
            arm=self.arm,
            numbers=itertools.count(1),
            patience_s=PATIENCE_S,
        )
        self.asked: list[Ask] = []
        self.held: list[int] = []
        self.delivered: list[tuple[int, int]] = []
        self.finished = False
        self.now = 0.0
        self.told: list[Standstill] = []

    def arm(self, slot: int, part: int) -> int | None:
        if (slot, part) in self.blocked:
            return None
        self.generations[slot, part] = self.generations.get((slot, part), 0) + 1
        return self.generations[slot, part]

    def advance(self) -> None:
        for action in self.ledger.advance(self.now):
            match action:
                case Ask():
                    assert self.generations[action.batch.slot, action.part.index] == action.generation
                    self.asked.append(action)
                case Deliver(batch):
                    assert batch.slot not in self.held, "a slot in the caller's hands was used again"
                    self.held.append(batch.slot)
                    plan = batch.plan
                    self.delivered += [(plan.epoch, i) for i in range(plan.first, plan.first + plan.count)]
                case Finish():
                    assert not self.finished
                    self.finished = True
                case Standstill():
                    self.told.append(action)

    def answer(self, index: int = 0) -> bool:
        ask = self.asked.pop(index)
        return self.ledger.filled(ask.node, ask.number)

    def let_go(self) -> None:
        while self.held:
            self.ledger.slot_returned(self.held.pop())


def test_batches_come_in_order_and_once_however_answers_come() -> None:
    """Answers in any order give batches in the schedule's."""
    world, rng = World(57, epochs=2), random.Random(1)
    world.ledger.node_up("a", 2)
    while not world.finished:
        world.advance()
        if world.asked:
            assert world.answer(rng.randrange(len(world.asked)))
        world.let_go()
    assert world.delivered == [(e, i) for e in range(2) for i in range(57)]
    assert [(a.expected, a.duplicates_refused, a.reassigned) for a in world.ledger.accounts] == [(57, 0, 0)] * 2


def test_nothing_is_asked_without_a_slot_or_a_node() -> None:
    """A request is a credit: no node, no request; no free slot, no request; never more than a node can digest."""
    world = World(200)
    world.advance()
    assert world.asked == []
    world.ledger.node_up("a", 1)
    world.advance()
    assert len(world.asked) == ASKS_PER_WORKER
    while world.asked:
        world.answer()
        world.advance()
    assert len(world.delivered) == 40  # four slots of ten, all in the caller's hands
    world.let_go()
    world.advance()
    assert world.asked


def test_a_lost_nodes_slices_are_asked_of_another() -> None:
    """What a node had not answered goes elsewhere under new numbers; its late answers are duplicates."""
    world = World(20)
    world.ledger.node_up("a", 4)
    world.advance()
    old = list(world.asked)
    world.asked.clear()
    world.ledger.node_up("b", 4)
    world.ledger.node_down("a")
    world.advance()
    assert {ask.node for ask in world.asked} == {"b"}
    assert not {ask.number for ask in old} & {ask.number for ask in world.asked}
    assert {(a.part.first, a.part.count) for a in world.asked} == {(a.part.first, a.part.count) for a in old}
    assert not any(world.ledger.filled(ask.node, ask.number) for ask in old)
    assert world.ledger.accounts[0].reassigned == len(old)
    assert world.ledger.accounts[0].duplicates_refused == len(old)


def test_an_answer_counts_once() -> None:
    """The second answer to one request is refused and counted."""
    world = World(10)
    world.ledger.node_up("a", 4)
    world.advance()
    first = world.asked[0]
    assert world.ledger.filled(first.node, first.number)
    assert not world.ledger.filled(first.node, first.number)
    assert not world.ledger.filled("somebody else", first.number)
    assert world.ledger.accounts[0].duplicates_refused == 2


def test_a_bad_record_is_judged_only_when_every_node_refused_it() -> None:
    """A part goes to the nodes that have not refused it; when all have, the verdict is due, and then it is asked anew."""
    world = World(3)
    world.ledger.node_up("a", 1)
    world.ledger.node_up("b", 1)
    world.advance()
    (first,) = world.asked
    assert not world.ledger.bad(first.node, first.number)
    world.advance()
    second = world.asked[1]
    assert second.node != first.node
    assert world.ledger.bad(second.node, second.number)
    assert not world.ledger.bad(second.node, second.number)  # nobody waits for this one any more
    world.ledger.exclude(17)
    world.advance()
    third = world.asked[2]
    assert third.part.excluded == (17,)
    assert world.ledger.filled(third.node, third.number)


def test_a_part_refused_by_all_that_are_left_is_asked_again() -> None:
    """The node that might have read it goes away before it was asked: the others are asked again, and judge."""
    world = World(3)
    world.ledger.node_up("a", 1)
    world.ledger.node_up("b", 1)
    world.advance()
    ask = world.asked.pop()
    assert not world.ledger.bad(ask.node, ask.number)
    world.ledger.node_down("b" if ask.node == "a" else "a")
    world.advance()
    again = world.asked.pop()
    assert again.node == ask.node
    assert world.ledger.bad(again.node, again.number)


def test_a_blocked_slot_is_left_and_taken_back_later() -> None:
    """A batch whose part a late writer holds moves to another slot, and the slot serves again when it is free."""
    world = World(40, slots=2)
    world.ledger.node_up("a", 9)
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
    """No slot can be armed: nothing is delivered; later everything is."""
    world = World(30, slots=3)
    world.ledger.node_up("a", 9)
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


def test_a_node_that_gives_nothing_is_told_of_and_relieved() -> None:
    """Once, with what it owes; others make that, and it is asked for nothing more until it gives something after all."""
    world = World(200, slots=2)
    world.ledger.node_up("mute", 2)
    world.advance()
    owed, world.asked = world.asked, []
    world.ledger.node_up("good", 9)
    world.now = PATIENCE_S - 1
    world.advance()
    assert world.told == []
    assert world.asked
    assert len(owed) == 2 * ASKS_PER_WORKER
    while world.asked:
        world.answer()
    world.now += 2
    world.advance()
    (told,) = world.told
    assert (told.node, told.owed, told.still_s, told.oldest_s) == ("mute", len(owed), PATIENCE_S + 1, PATIENCE_S + 1)
    assert (told.oldest, told.elsewhere) == (owed[0].part, True)
    assert "owes 6 slices, the oldest of positions 0 to 2 since 31 s; the next batch, at position 0" in str(told)
    assert {ask.node for ask in world.asked} == {"good"}
    assert {ask.part.first for ask in owed} <= {ask.part.first for ask in world.asked}
    while len(world.delivered) < 60:
        world.answer()
        world.let_go()
        world.advance()
        assert {ask.node for ask in world.asked} <= {"good"}
    assert not world.ledger.filled("mute", owed[0].number)
    world.let_go()
    while world.asked:
        world.answer()
    world.advance()
    assert "mute" in {ask.node for ask in world.asked}
    assert len(world.told) == 1


def test_a_node_that_gives_nothing_is_waited_for_where_it_is_the_only_one() -> None:
    """It is told of once and keeps what it owes, until another node comes."""
    world = World(20)
    world.ledger.node_up("mute", 1)
    world.advance()
    for _ in range(5):
        world.now += PATIENCE_S
        world.advance()
    (told,) = world.told
    assert str(told).endswith("there is no other node to ask")
    assert {ask.node for ask in world.asked} == {"mute"}
    owed, world.asked = world.asked, []
    world.ledger.node_up("new", 9)
    world.advance()
    assert {ask.part.first for ask in owed} <= {ask.part.first for ask in world.asked}
    assert {ask.node for ask in world.asked} == {"new"}
    assert len(world.told) == 1


def test_a_node_that_is_slow_is_left_alone() -> None:
    """Whoever gives a piece, a slice or an excuse now and then does not stand still; nor who owes nothing."""
    world = World(10, slice_samples=10)
    world.ledger.node_up("slow", 1)
    world.ledger.node_up("idle", 1)
    world.advance()
    (ask,) = world.asked
    for _ in range(10):
        world.now += PATIENCE_S * 0.9
        assert world.ledger.answering(ask.node, ask.number) is not None
        world.advance()
    assert world.told == []
    world.now += PATIENCE_S * 0.9
    assert world.ledger.excused(ask.node, ask.number)
    world.advance()
    assert world.told == []


def test_a_record_is_judged_without_a_node_that_stands_still() -> None:
    """Every node that can be asked has refused it: nobody waits for one that gives nothing."""
    world = World(6, batch=3, slots=2)
    for name in ("a", "b"):
        world.ledger.node_up(name, 1)
    world.advance()
    mute, good = sorted(world.asked, key=lambda ask: ask.node)
    world.now = PATIENCE_S - 1
    world.ledger.answering(good.node, good.number)
    world.advance()
    world.now = PATIENCE_S + 1
    world.advance()
    assert [told.node for told in world.told] == [mute.node]
    assert world.ledger.bad(good.node, good.number)


@pytest.mark.parametrize("seed", range(60))
def test_exactly_once_under_random_faults(seed: int) -> None:
    """Nodes come, go and stand still, answers are late, doubled or excuses, parts are blocked: each position once, in order."""
    rng = random.Random(seed)
    world = World(rng.randrange(1, 150), batch=rng.randrange(1, 20), slots=rng.randrange(2, 6), slice_samples=rng.randrange(1, 8), epochs=2)  # fmt: skip
    records = world.ledger._schedule.records
    answered: list[Ask] = []
    alive: set[str] = set()
    for step in itertools.count():
        calm = step > 3000  # faults end, so that the run can
        world.now += rng.choice((0.0, 0.0, 0.0, PATIENCE_S / 3))
        world.advance()
        if world.finished:
            break
        event = rng.random()
        if event < 0.05 or (calm and not alive):
            name = rng.choice("abc")
            alive.add(name)
            world.ledger.node_up(name, rng.randrange(1, 4))
        elif event < 0.08 and alive and not calm:
            name = alive.pop()
            world.ledger.node_down(name)
            if rng.random() < 0.5:  # half of the lost answers come after all, when nobody waits for them
                answered += [ask for ask in world.asked if ask.node == name]
            world.asked = [ask for ask in world.asked if ask.node != name]
        elif event < 0.12 and not calm:
            world.blocked.add((rng.randrange(6), rng.randrange(4)))
        elif event < 0.2 or calm:
            world.blocked.clear()
        elif event < 0.25 and answered:
            duplicate = rng.choice(answered)
            world.ledger.filled(duplicate.node, duplicate.number)
        elif event < 0.28 and world.asked:
            ask = world.asked.pop(rng.randrange(len(world.asked)))
            world.ledger.excused(ask.node, ask.number)
        if world.asked and rng.random() < 0.8:
            ask = world.asked.pop(rng.randrange(len(world.asked)))
            answered.append(ask)
            world.ledger.filled(ask.node, ask.number)
        if rng.random() < 0.5:
            world.let_go()
    assert world.delivered == [(e, i) for e in range(2) for i in range(records)]
