"""The scheduler: the state of a node's workers, clients, requests and leases, without I/O.

An event comes in as a method call; the actions that follow from it go out as a list, for the dispatcher to carry out in
order. This file uses no socket, clock or process. An event of an unknown client, or of a lease that does not exist any
more, changes nothing and returns no action: such events arrive late and are no errors.

A worker (:attr:`WorkerRecord.state`)::

    state       event                               next state
    STARTING    worker_forked and worker_ready      IDLE
    IDLE        Grant                               WORKING
    WORKING     its last lease ends                 IDLE
    any         worker_died                         STARTING: a new process takes its place

A request (:class:`Task`)::

    state       event                               next state
    (none)      requested                           QUEUED, or refused
    QUEUED      a worker and, without a place,      LEASED: Grant
                a send slot are free
    QUEUED      client_left                         dropped
    LEASED      worker_done                         Answer
    LEASED      worker_failed                       Refuse
    LEASED      worker_died                         QUEUED, at the front; or Refuse, after CRASHES crashes or
                                                    if its client is barred
    QUEUED      client_barred, with a place         Refuse
    LEASED      client_left                         LEASED; its result will be dropped

Invariants:

- A request has at most one lease at a time, and a lease number is used once.
- Each request of a client that stays gets exactly one Answer or Refuse.
- A worker has at most DEPTH leases.
- Each segment that a client has attached is released by exactly one Detach.
- A send slot is free, belongs to one LEASED task, or holds one answered slice until ``slot_freed``.

**Fairness** is start-time fair queueing (Goyal, Vin and Cheng, 1996). Each client is charged the worker time of its
slices, and the client with the lowest charge is served next. So a client of costly ten-crop slices and a client of cheap
ones get half of the workers each.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from loader_service import defaults
from loader_service.node.packets import Destination
from loader_service.types import MAX_EXCLUDED, SampleLayout, SliceId, StageSeconds
from loader_service.wire.messages import Failed, Place, Request, SlotLayout, WorkerState

DEPTH: Final = 2
"""Leases per worker: one that it writes and one that waits, so that it never waits for the dispatcher."""

CRASHES: Final = 3
"""Crashed workers after which a lease's record counts as bad. One crash may be an accident; three are the record's fault."""

REQUEST_BYTES: Final = 2048
"""Memory of a waiting request, without its exclusions: less than 2 KiB, mostly for small Python objects."""

QUEUE_BYTES: Final = 2**20
"""Upper bound of the memory of a client's waiting requests, for a node of up to 34 workers. Only a broken client reaches it."""

QUEUE_BYTES_PER_WORKER: Final = defaults.ASKS_PER_WORKER * (REQUEST_BYTES + 8 * MAX_EXCLUDED)
"""The same per worker, for larger nodes: the largest requests that a client asks for at a time."""

NO_SECONDS: Final = StageSeconds()


@dataclass(frozen=True)
class ClientSegment:
    """The shared memory that a client has attached: its name, the offset of its data in bytes, the layout of its slots."""

    name: str
    data_offset: int
    layout: SlotLayout

    def fits(self, request: Request, place: Place) -> bool:
        """Return whether a request's slice fits the part of its place, and its samples are those of the layout."""
        sample, layout = SampleLayout(request.what.view, request.dtype), self.layout
        return (
            (sample.image_bytes, sample.draws_bytes) == (layout.image_bytes, layout.draws_bytes)
            and place.part < layout.parts
            and request.what.count <= layout.samples(place.part)
        )

    def destination(self, place: Place) -> Destination:
        """Return the bytes that a place stands for."""
        offsets = (self.data_offset + at for at in self.layout.offsets(place.part))
        return Destination(place.part, place.generation, *offsets)


# eq=False: records are compared by identity; _present relies on it.
@dataclass(eq=False)
class ClientRecord:
    """The record of one client."""

    id: bytes
    name: str
    segment: ClientSegment | None = None  # None: it receives slices in frames
    barred: str = ""  # the reason why its shared memory is not written any more; empty: it may be
    queue: deque[Task] = field(default_factory=deque)
    queued_bytes: int = 0  # memory of the queue
    charged_s: float = 0.0  # worker time, see Fairness; only differences between clients matter
    sending: int = 0  # send slots that it occupies
    slices: int = 0
    samples: int = 0
    delivered_bytes: int = 0


@dataclass(eq=False)
class Task:
    """A request that is queued or leased.

    ``request`` is without its exclusions, which are kept as 8 bytes each: as Python's integers they would take 40.
    """

    client: ClientRecord
    request: Request
    segment: ClientSegment | None = None  # the one attached at the time of the request
    excluded: array[int] | None = None
    crashes: int = 0  # workers that crashed on it
    estimate_s: float = 0.0  # the charge of its lease, corrected when the lease is done
    slot: int | None = None  # its send slot, for a request without a place

    @classmethod
    def of(cls, client: ClientRecord, request: Request) -> Task:
        """Return the task of a request."""
        if not request.what.excluded:
            return cls(client, request, client.segment)
        what = msgspec.structs.replace(request.what, excluded=())
        stripped = msgspec.structs.replace(request, what=what)
        return cls(client, stripped, client.segment, array("Q", request.what.excluded))

    @property
    def what(self) -> SliceId:
        """The identity of its slice, with the exclusions."""
        what = self.request.what
        return what if self.excluded is None else msgspec.structs.replace(what, excluded=tuple(self.excluded))

    @property
    def memory_bytes(self) -> int:
        """The memory that it takes while it waits."""
        return REQUEST_BYTES + 8 * len(self.excluded or ())


@dataclass(eq=False)
class WorkerRecord:
    """The record of one worker. A new process continues the counters of the one it replaces."""

    index: int
    pid: int = 0
    ready: bool = False
    tasks: dict[int, Task] = field(
        default_factory=dict
    )  # by lease number; the oldest, which it writes now, comes first
    slices: int = 0
    samples: int = 0
    busy_s: float = 0.0
    stages: StageSeconds = NO_SECONDS

    @property
    def state(self) -> WorkerState:
        """The state of the worker, see the table at the top of this file."""
        if self.tasks:
            return WorkerState.WORKING
        return WorkerState.IDLE if self.ready and self.pid else WorkerState.STARTING


@dataclass(frozen=True)
class Grant:
    """The action to send a worker a lease."""

    worker: int
    lease: int
    task: Task


@dataclass(frozen=True)
class Answer:
    """The action to tell a client that its slice is complete, and to send the slice from its send slot if it has one."""

    task: Task


@dataclass(frozen=True)
class Refuse:
    """The action to tell a client that its slice cannot be made."""

    client: bytes
    message: Failed


@dataclass(frozen=True)
class Detach:
    """The action to let go of a client's segment, here and in all workers."""

    client: bytes
    segment: str


Action = Grant | Answer | Refuse | Detach


class Scheduler:
    """The state of a node.

    Args:
        workers: number of workers; their indices start at 0.
        send_slots: number of slots for slices in frames.
    """

    def __init__(self, workers: int, send_slots: int) -> None:
        self.workers = [WorkerRecord(i) for i in range(workers)]
        self.clients: dict[bytes, ClientRecord] = {}
        self.reassigned = 0
        self.restarts = 0
        self.bad_samples = 0  # failures that named a record
        self.samples = 0  # delivered, also to clients that have left since
        self.delivered_bytes = 0
        self.queue_bytes = max(QUEUE_BYTES, QUEUE_BYTES_PER_WORKER * workers)  # upper bound, for each client
        self._free_slots = list(range(send_slots))
        self._send_slots = send_slots
        self._next_lease = 0
        self._cost_s = 1e-4  # running mean of seconds per sample, an estimate for the charge of a new lease

    # Clients

    def client_joined(self, client: bytes, name: str) -> list[Action]:
        """Add a client that said Hello. A known client starts anew: its earlier requests are dropped."""
        actions = self.client_left(client)  # what the earlier one held may serve others now
        # It starts at the lowest charge of the others: at 0 it would get all workers until it caught up.
        floor = min((c.charged_s for c in self.clients.values()), default=0.0)
        self.clients[client] = ClientRecord(client, name, charged_s=floor)
        return actions

    def client_attached(self, client: bytes, segment: ClientSegment) -> list[Action]:
        """Note that the node can write a client's shared memory. With another segment than before it starts anew.

        So no request that was made for the one segment is written to the other.
        """
        known = self.clients.get(client)
        if known is None:
            return []
        actions = self.client_joined(client, known.name) if known.segment not in (None, segment) else []
        self.clients[client].segment = segment
        return actions

    def client_barred(self, client: bytes, reason: str) -> list[Action]:
        """Stop writing into a client's shared memory, and refuse its requests for that; frames stay open to it."""
        known = self.clients.get(client)
        if known is None:
            return []
        actions = self._detach(known)
        known.barred = reason
        refused = [task for task in known.queue if task.request.place is not None]
        known.queue = deque(task for task in known.queue if task.request.place is None)
        known.queued_bytes = sum(task.memory_bytes for task in known.queue)
        for task in refused:
            actions += self._refuse(task, -1, reason)
        return actions + self._dispatch()

    def client_left(self, client: bytes) -> list[Action]:
        """Remove a client and its queued requests. Its leases continue, and their results are dropped."""
        gone = self.clients.pop(client, None)
        actions: list[Action] = []
        if gone:
            actions = self._detach(gone)
            for task in gone.queue:
                self._release_slot(task)
            gone.queue.clear()
        return actions + self._dispatch()

    def requested(self, client: bytes, request: Request) -> list[Action]:
        """Queue a client's request, or refuse it."""
        asking = self.clients.get(client)  # None: it left, or was forgotten, while the request was on its way
        if asking is None:
            return []
        if flaw := _flaw(asking, request):
            return [Refuse(client, Failed(request.id, -1, flaw))]
        task = Task.of(asking, request)
        if asking.queued_bytes + task.memory_bytes > self.queue_bytes:
            reason = (
                f"this client's waiting requests take {asking.queued_bytes} bytes, and {self.queue_bytes} is the limit"
            )
            return [Refuse(client, Failed(request.id, -1, reason))]
        if not asking.queue:  # an idle client saves no credit: its charge rises to that of the busy clients
            floor = min((c.charged_s for c in self.clients.values() if c.queue), default=asking.charged_s)
            asking.charged_s = max(asking.charged_s, floor)
        asking.queue.append(task)
        asking.queued_bytes += task.memory_bytes
        return self._dispatch()

    def slot_freed(self, slot: int, client: ClientRecord) -> list[Action]:
        """Reuse a send slot that libzmq has released."""
        client.sending -= 1  # it may have left: its record lives as long as its last frame
        self._free_slots.append(slot)
        return self._dispatch()

    # Workers

    def worker_forked(self, index: int, pid: int) -> list[Action]:
        """Note the process of a worker. It may still be opening its datasets."""
        self.workers[index].pid = pid
        return []

    def worker_ready(self, index: int) -> list[Action]:
        """Start giving leases to a worker whose datasets are open."""
        self.workers[index].ready = True
        return self._dispatch()

    def worker_done(self, index: int, lease: int, seconds: float, stages: StageSeconds = NO_SECONDS) -> list[Action]:
        """Answer the request of a lease whose slice is written.

        Args:
            index: the worker.
            lease: number of the lease.
            seconds: time that the slice took.
            stages: the same time, by stage.
        """
        worker = self.workers[index]
        task = worker.tasks.pop(lease, None)
        if task is None:
            return []
        samples = task.request.what.count * task.request.what.view.crops_per_record
        worker.slices += 1
        worker.samples += samples
        worker.busy_s += seconds
        worker.stages += stages
        self._cost_s += (seconds / samples - self._cost_s) / 16  # an exponential mean over some 16 slices
        task.client.charged_s += seconds - task.estimate_s  # the estimate was charged with the Grant
        if not self._present(task):  # its client left, or said Hello again
            self._release_slot(task)
            return self._dispatch()
        size = SampleLayout(task.request.what.view, task.request.dtype).sample_bytes * task.request.what.count
        task.client.slices += 1
        task.client.samples += samples
        task.client.delivered_bytes += size
        self.samples += samples
        self.delivered_bytes += size
        return [Answer(task), *self._dispatch()]

    def worker_failed(self, index: int, lease: int, record: int, reason: str, source: str = "") -> list[Action]:
        """Refuse the request of a lease that a worker cannot write; ``record`` is -1 if no record is the reason."""
        task = self.workers[index].tasks.pop(lease, None)
        if task is None:
            return []
        return [*self._refuse(task, record, reason, source), *self._dispatch()]

    def worker_died(self, index: int, *, crashed: bool, record: int, how: str) -> list[Action]:
        """Queue the leases of a dead worker again, for other workers. Its locks are gone with its process.

        Args:
            index: the worker.
            crashed: True if it ended by itself (a fault, an exception), False if it was killed from outside.
            record: the record that it read, as it had published; -1 if none.
            how: the end of the process, for people.
        """
        dead = self.workers[index]
        self.workers[index] = WorkerRecord(  # pid 0 and not ready until the new process is; the counters go on
            index, slices=dead.slices, samples=dead.samples, busy_s=dead.busy_s, stages=dead.stages
        )
        self.restarts += 1
        actions: list[Action] = []
        tasks = list(dead.tasks.values())
        if tasks and crashed:  # only the oldest lease was being written
            tasks[0].crashes += 1
            if tasks[0].crashes >= CRASHES:
                reason = f"it crashed {CRASHES} workers, the last by {how}"
                actions += self._refuse(tasks.pop(0), record, reason)
        for task in reversed(tasks):  # reversed, since each goes to the front of its queue
            if task.client.barred and task.request.place is not None:
                actions += self._refuse(task, -1, task.client.barred)
            elif self._present(task):
                self.reassigned += 1
                task.client.charged_s -= task.estimate_s
                task.client.queue.appendleft(task)  # with its send slot, if any; the lock is free
                task.client.queued_bytes += task.memory_bytes
            else:
                self._release_slot(task)
        return actions + self._dispatch()

    @property
    def leases(self) -> int:
        """Number of leases that workers hold."""
        return sum(len(worker.tasks) for worker in self.workers)

    @property
    def queued(self) -> int:
        """Number of requests that wait for a worker or a send slot."""
        return sum(len(client.queue) for client in self.clients.values())

    @property
    def send_slots_used(self) -> int:
        """Number of send slots that hold a slice, being written or being sent."""
        return self._send_slots - len(self._free_slots)

    # Internals

    def _dispatch(self) -> list[Action]:
        """Lease queued requests to workers until workers, requests or send slots run out."""
        actions: list[Action] = []
        for worker in self._idle():
            task = self._next_task()
            if task is None:
                break
            # Never reused, so a late answer finds nothing.
            lease, self._next_lease = self._next_lease, self._next_lease + 1
            what = task.request.what
            task.estimate_s = self._cost_s * what.count * what.view.crops_per_record
            task.client.charged_s += task.estimate_s
            worker.tasks[lease] = task
            actions.append(Grant(worker.index, lease, task))
        return actions

    def _idle(self) -> Iterator[WorkerRecord]:
        """Yield workers with room for a lease, the emptiest first, each once per free place."""
        for depth in range(DEPTH):  # all workers get a first lease before any gets a second
            for worker in self.workers:
                # Lazy: it sees the leases that _dispatch gives meanwhile.
                if worker.ready and len(worker.tasks) == depth:
                    yield worker

    def _next_task(self) -> Task | None:
        """Remove and return the first request of the client with the lowest charge that can be served now; None if none."""
        # Each client may fill its share of the send slots, so that one that reads slowly cannot block the others.
        share = max(1, self._send_slots // max(1, len(self.clients)))
        # At most MAX_CLIENTS, in practice a few.
        for client in sorted(self.clients.values(), key=lambda c: c.charged_s):
            if not client.queue:
                continue
            task = client.queue[0]
            if task.request.place is None and task.slot is None:  # a task of a dead worker still has its slot
                if not self._free_slots or client.sending >= share:
                    continue
                task.slot = self._free_slots.pop()
                client.sending += 1
            client.queue.popleft()
            client.queued_bytes -= task.memory_bytes
            return task
        return None

    def _detach(self, client: ClientRecord) -> list[Action]:
        segment, client.segment = client.segment, None
        return [Detach(client.id, segment.name)] if segment else []

    def _present(self, task: Task) -> bool:
        """Return whether the client of a task is still connected, and has not said Hello again since."""
        return self.clients.get(task.client.id) is task.client  # a repeated Hello makes a new record

    def _refuse(self, task: Task, record: int, reason: str, source: str = "") -> list[Action]:
        self._release_slot(task)
        self.bad_samples += record >= 0  # True counts as 1
        if not self._present(task):
            return []
        # Cut to the bound of Text: the client drops a message that exceeds it.
        return [Refuse(task.client.id, Failed(task.request.id, record, reason[:4096], source[:4096]))]

    def _release_slot(self, task: Task) -> None:
        if task.slot is not None:
            self._free_slots.append(task.slot)
            task.client.sending -= 1
            task.slot = None


def _flaw(client: ClientRecord, request: Request) -> str:
    """Return the reason why no worker may write to the place of a request; empty if one may, or if it has none."""
    place, segment = request.place, client.segment
    if place is None:
        return ""
    if segment is None:
        return client.barred or "no shared memory is attached"
    return "" if segment.fits(request, place) else f"the slice does not fit part {place.part} of the attached segment"
