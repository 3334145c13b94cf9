"""The scheduler under every kind of event, without a socket, a clock or a process."""

from __future__ import annotations

import random

import msgspec
import pytest

from loader_service.defaults import ASKS_PER_WORKER
from loader_service.node.packets import Destination
from loader_service.node.scheduler import (
    CRASHES,
    DEPTH,
    Action,
    Answer,
    ClientSegment,
    Detach,
    Grant,
    Refuse,
    Scheduler,
)
from loader_service.types import MAX_EXCLUDED, SliceId, View
from loader_service.wire.messages import Place, Request, SlotLayout

PLACE = Place(0, 1)
SEGMENT = ClientSegment("loader-service-" + "0" * 32, 8192, SlotLayout(2, 64, 32, 224 * 224 * 3, 12))


def _request(number: int, *, view: str = "center", count: int = 32, place: Place | None = PLACE) -> Request:
    return Request("0" * 32, number, "train", SliceId(View.named(view), 0, 0, 0, count), "uint8", place)


def _grants(actions: list[Action]) -> list[Grant]:
    return [action for action in actions if isinstance(action, Grant)]


def _ready(workers: int, send_slots: int = 4) -> Scheduler:
    scheduler = Scheduler(workers, send_slots)
    for index in range(workers):
        scheduler.worker_forked(index, 1000 + index)
        scheduler.worker_ready(index)
    return scheduler


def _join(scheduler: Scheduler, client: bytes, segment: ClientSegment = SEGMENT) -> None:
    scheduler.client_joined(client, client.decode())
    scheduler.client_attached(client, segment)


def test_requests_go_to_the_emptiest_worker_up_to_the_depth() -> None:
    """Each worker gets one lease, then a second one that waits; further requests stay queued."""
    scheduler = _ready(2)
    _join(scheduler, b"a")
    grants = [g for n in range(6) for g in _grants(scheduler.requested(b"a", _request(n)))]
    assert [g.worker for g in grants] == [0, 1, 0, 1]
    assert scheduler.leases == 2 * DEPTH
    assert [type(a) for a in scheduler.worker_done(0, grants[0].lease, 0.001)] == [Answer, Grant]


def test_a_worker_that_is_not_ready_gets_nothing() -> None:
    """Requests wait until a worker is ready."""
    scheduler = Scheduler(1, 1)
    _join(scheduler, b"a")
    assert scheduler.requested(b"a", _request(1)) == []
    assert len(_grants(scheduler.worker_ready(0))) == 1


def test_a_client_that_says_hello_again_frees_what_it_held_for_others() -> None:
    """The grants that its earlier requests held back are returned, since a lease without its Grant would hang a worker."""
    scheduler = _ready(1, send_slots=2)
    _join(scheduler, b"a")
    _join(scheduler, b"b")
    assert len(_grants(scheduler.requested(b"b", _request(1, place=None)))) == 1
    assert scheduler.requested(b"b", _request(2, place=None)) == []  # two clients share two send slots
    grants = _grants(scheduler.client_joined(b"a", "a"))
    assert [grant.task.request.id for grant in grants] == [2]
    assert scheduler.leases == 2


def test_a_dead_workers_leases_go_to_another_in_order() -> None:
    """Both leases of a dead worker are granted again, before later requests, and counted."""
    scheduler = _ready(2)
    _join(scheduler, b"a")
    for number in range(8):
        scheduler.requested(b"a", _request(number))
    actions = scheduler.worker_died(0, crashed=False, record=5, how="signal SIGKILL")
    assert actions == []  # the other worker is full
    first = next(iter(scheduler.workers[1].tasks))
    granted = _grants(scheduler.worker_done(1, first, 0.001))
    assert [g.task.request.id for g in granted] == [0]
    assert scheduler.reassigned == 2
    assert scheduler.restarts == 1


def test_a_killed_worker_never_makes_a_record_bad() -> None:
    """A request is leased again after any number of workers that were killed from outside."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    scheduler.requested(b"a", _request(1))
    for _ in range(5 * CRASHES):
        assert not any(isinstance(a, Refuse) for a in scheduler.worker_died(0, crashed=False, record=7, how="signal"))
        assert len(_grants(scheduler.worker_ready(0))) == 1


def test_a_record_that_crashes_its_workers_is_named() -> None:
    """After the third crash on one lease its client gets a Failed with the record; the next lease is not affected."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    scheduler.requested(b"a", _request(1))
    scheduler.requested(b"a", _request(2))
    for _ in range(CRASHES - 1):
        assert scheduler.worker_died(0, crashed=True, record=7, how="signal SIGSEGV") == []
        scheduler.worker_ready(0)
    (refusal,) = scheduler.worker_died(0, crashed=True, record=7, how="signal SIGSEGV")
    assert isinstance(refusal, Refuse)
    assert (refusal.message.id, refusal.message.record) == (1, 7)
    assert "SIGSEGV" in refusal.message.reason
    assert [g.task.request.id for g in _grants(scheduler.worker_ready(0))] == [2]


def test_a_client_that_left_gets_no_answers_and_its_slots_come_back() -> None:
    """A lease of a client that has left gets no answer, and its send slot serves another client."""
    scheduler = _ready(1, send_slots=1)
    scheduler.client_joined(b"a", "a")
    (grant,) = _grants(scheduler.requested(b"a", _request(1, place=None)))
    scheduler.client_left(b"a")
    scheduler.client_joined(b"b", "b")
    assert scheduler.requested(b"b", _request(2, place=None)) == []
    actions = scheduler.worker_done(0, grant.lease, 0.001)
    assert [type(a) for a in actions] == [Grant]
    assert _grants(actions)[0].task.request.id == 2


def test_a_client_that_says_hello_again_starts_afresh() -> None:
    """Requests from before a second Hello are neither queued nor answered."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    grants = [g for n in range(5) for g in _grants(scheduler.requested(b"a", _request(n)))]
    _join(scheduler, b"a")
    assert not any(isinstance(a, Answer) for g in grants for a in scheduler.worker_done(0, g.lease, 0.001))
    assert scheduler.leases == 0


def test_a_place_without_shared_memory_is_refused() -> None:
    """A request with a place is refused if its client has attached no segment."""
    scheduler = _ready(1)
    scheduler.client_joined(b"a", "a")
    (refusal,) = scheduler.requested(b"a", _request(1))
    assert isinstance(refusal, Refuse)
    assert refusal.message.record == -1


def test_costly_slices_do_not_starve_cheap_ones() -> None:
    """Two clients, one with slices that take ten times as long, get about half of the workers' time each."""
    scheduler = _ready(2)
    _join(scheduler, b"cheap")
    layout = msgspec.structs.replace(SEGMENT.layout, image_bytes=10 * 224 * 224 * 3, draws_bytes=120)
    _join(scheduler, b"costly", ClientSegment("costly", 8192, layout))  # of a ten-crop client
    spent = {b"cheap": 0.0, b"costly": 0.0}
    number, running = 0, []
    for client in spent:
        for _ in range(50):
            number += 1
            running += _grants(scheduler.requested(client, _request(number, view="center" if client == b"cheap" else "ten-crop")))  # fmt: skip
    for _ in range(600):
        grant = running.pop(0)
        client = grant.task.client.id
        seconds = 0.01 if client == b"costly" else 0.001
        spent[client] += seconds
        running += _grants(scheduler.worker_done(grant.worker, grant.lease, seconds))
        number += 1
        view = "center" if client == b"cheap" else "ten-crop"
        running += _grants(scheduler.requested(client, _request(number, view=view)))
    assert 0.8 < spent[b"cheap"] / spent[b"costly"] < 1.25


def test_a_client_that_never_takes_its_slices_does_not_take_all_send_slots() -> None:
    """A client that reads nothing occupies only its share of the send slots, and another is served."""
    scheduler = _ready(2, send_slots=4)
    for client in (b"stuck", b"alive"):
        scheduler.client_joined(client, client.decode())
    running = [g for n in range(20) for g in _grants(scheduler.requested(b"stuck", _request(n, place=None)))]
    for grant in running:
        scheduler.worker_done(grant.worker, grant.lease, 0.001)
    served = 0
    for number in range(100, 130):
        for grant in _grants(scheduler.requested(b"alive", _request(number, place=None))):
            (answer, *_) = scheduler.worker_done(grant.worker, grant.lease, 0.001)
            assert isinstance(answer, Answer)
            assert answer.task.slot is not None
            served += 1
            scheduler.slot_freed(answer.task.slot, answer.task.client)
    assert served >= 28


@pytest.mark.parametrize("seed", range(40))
def test_every_request_is_answered_once_whatever_happens(seed: int) -> None:
    """Each request of a client that stays gets exactly one answer while workers die and other clients leave and return."""
    rng = random.Random(seed)
    scheduler = _ready(3, send_slots=5)
    _join(scheduler, b"stays")
    number, answers = 0, dict[int, int]()
    running: dict[tuple[int, int], Grant] = {}
    sending = []

    def carry_out(actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Grant(worker, lease, _):
                    assert (worker, lease) not in running
                    running[worker, lease] = action
                case Answer(task):
                    if task.client.id == b"stays":
                        answers[task.request.id] = answers.get(task.request.id, 0) + 1
                    if task.slot is not None:
                        sending.append((task.slot, task.client))

    for _ in range(1000):
        event = rng.random()
        if event < 0.4:
            number += 1
            client = b"stays" if rng.random() < 0.6 else b"leaves"
            if client == b"stays":
                answers[number] = 0
            carry_out(scheduler.requested(client, _request(number, place=rng.choice([None, PLACE]))))
        elif event < 0.8 and running:
            (worker, lease), _ = running.popitem()
            carry_out(scheduler.worker_done(worker, lease, rng.random() / 100))
        elif event < 0.85:
            worker = rng.randrange(3)
            for key in [key for key in running if key[0] == worker]:
                del running[key]
            carry_out(scheduler.worker_died(worker, crashed=False, record=-1, how="signal SIGKILL"))
            carry_out(scheduler.worker_ready(worker))
        elif event < 0.9:
            carry_out(scheduler.client_left(b"leaves"))
            _join(scheduler, b"leaves")
        elif sending:
            carry_out(scheduler.slot_freed(*sending.pop(rng.randrange(len(sending)))))
    carry_out(scheduler.client_left(b"leaves"))
    while running or sending:
        while sending:
            carry_out(scheduler.slot_freed(*sending.pop()))
        if running:
            (worker, lease), _ = running.popitem()
            carry_out(scheduler.worker_done(worker, lease, 0.001))
    assert set(answers.values()) == {1}
    assert sorted(scheduler._free_slots) == list(range(5))


# Shared memory


@pytest.mark.parametrize(
    "request_",
    [
        _request(1, place=Place(SEGMENT.layout.parts, 1)),
        _request(1, place=Place(0, 1), count=33),
        _request(1, place=Place(0, 1), view="whole"),
        msgspec.structs.replace(_request(1, place=Place(0, 1)), dtype="float32"),
    ],
    ids=["no such part", "more samples than the part has", "larger pixels", "wider pixels"],
)
def test_a_slice_must_fit_the_part_that_it_names(request_: Request) -> None:
    """A request is refused if its slice would reach beyond its part."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    (refusal,) = scheduler.requested(b"a", request_)
    assert isinstance(refusal, Refuse)
    assert refusal.message.reason.startswith("the slice does not fit part ")


def test_a_place_is_the_part_of_the_layout() -> None:
    """The offsets of a slice follow from its part alone: the areas of its slot, and its first sample in each."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    (grant,) = _grants(scheduler.requested(b"a", _request(1, place=Place(3, 7))))
    assert grant.task.segment is not None
    layout = SEGMENT.layout
    slot, pixels = 8192 + layout.slot_bytes, 32 * layout.image_bytes
    labels = 64 * layout.image_bytes  # a multiple of a page
    assert grant.task.segment.destination(Place(3, 7)) == Destination(
        3, 7, slot + pixels, slot + labels + 32 * 8, slot + labels + 4096 + 32 * 12
    )


def test_a_segment_is_released_when_its_client_leaves_joins_again_or_attaches_another() -> None:
    """Each attached segment is released by one Detach, also if the same client attaches it again."""
    scheduler, other = _ready(1), ClientSegment("other", 8192, SEGMENT.layout)
    _join(scheduler, b"a")
    assert scheduler.client_attached(b"a", SEGMENT) == []
    assert Detach(b"a", SEGMENT.name) in scheduler.client_joined(b"a", "a")
    assert scheduler.client_attached(b"a", SEGMENT) == []
    assert Detach(b"a", SEGMENT.name) in scheduler.client_attached(b"a", other)
    assert scheduler.client_left(b"a") == [Detach(b"a", "other")]
    assert scheduler.client_left(b"a") == []


def test_a_request_for_one_segment_is_never_written_to_another() -> None:
    """A client that attaches another segment starts anew: requests that wait are dropped, and those leased are not answered."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    leases = [g.lease for n in range(DEPTH + 2) for g in _grants(scheduler.requested(b"a", _request(n)))]
    actions = scheduler.client_attached(b"a", ClientSegment("other", 8192, SEGMENT.layout))
    assert _grants(actions) == []
    assert scheduler.worker_done(0, leases[0], 0.001) == []
    assert scheduler.worker_died(0, crashed=False, record=-1, how="signal SIGKILL") == []
    assert scheduler.queued == 0


def test_a_barred_client_gets_its_reason_and_frames() -> None:
    """All requests with a place are refused with the reason: waiting ones, new ones and those of a dead worker."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    for number in range(DEPTH + 2):
        scheduler.requested(b"a", _request(number))
    scheduler.requested(b"a", _request(9, place=None))
    detach, *refusals = scheduler.client_barred(b"a", "it has shrunk")
    assert detach == Detach(b"a", SEGMENT.name)
    refusals += scheduler.worker_died(0, crashed=True, record=5, how="signal SIGBUS")
    refusals += scheduler.requested(b"a", _request(DEPTH + 2))
    failures = [action.message for action in refusals if isinstance(action, Refuse)]
    assert sorted(failure.id for failure in failures) == list(range(DEPTH + 3))
    assert {(failure.record, failure.reason) for failure in failures} == {(-1, "it has shrunk")}
    assert scheduler.bad_samples == 0
    assert [g.task.request.id for g in _grants(scheduler.worker_ready(0))] == [9]


def test_a_clients_queue_is_bounded_in_bytes_and_drains() -> None:
    """Requests beyond the bound are refused with the reason; requests that leave the queue make room for others."""
    scheduler = _ready(1)
    _join(scheduler, b"a")
    excluded = tuple(range(MAX_EXCLUDED))
    large = msgspec.structs.replace(_request(0), what=msgspec.structs.replace(_request(0).what, excluded=excluded))
    grants, refusals, number = [], [], 0
    while not refusals:
        actions = scheduler.requested(b"a", msgspec.structs.replace(large, id=number))
        grants += _grants(actions)
        refusals += [action for action in actions if isinstance(action, Refuse)]
        number += 1
    assert f"{scheduler.queue_bytes} is the limit" in refusals[0].message.reason
    assert scheduler.queued < number <= scheduler.queue_bytes // (8 * MAX_EXCLUDED)
    assert all(grant.task.what.excluded == excluded for grant in grants)
    done = 0
    while grants:
        grants += _grants(scheduler.worker_done(0, grants.pop(0).lease, 0.001))
        done += 1
    assert done == number - 1
    assert scheduler.clients[b"a"].queued_bytes == 0


@pytest.mark.parametrize("workers", [1, 16, 64, 1024])
def test_what_a_client_asks_for_at_a_time_fits_its_queue(workers: int) -> None:
    """The most requests that a client has at one node, each with the most exclusions, are all accepted."""
    scheduler = Scheduler(workers, 1)  # no worker is ready, so all requests wait
    _join(scheduler, b"a")
    what = msgspec.structs.replace(_request(0).what, excluded=tuple(range(MAX_EXCLUDED)))
    for number in range(ASKS_PER_WORKER * workers):
        assert scheduler.requested(b"a", msgspec.structs.replace(_request(number), what=what)) == []
