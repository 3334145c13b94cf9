"""Who works on what: a node's workers, its clients, their requests and the leases between them.

Rules of this file: no sockets, clocks or processes. An event comes in as a method call; the actions it calls for come
out as a list, to be carried out in order. A request is leased to one worker at a time; a lease ends when its worker
says so or dies, and then the request is answered or leased again. An event that cannot be (from a worker or client
that is not there) changes nothing and gives no actions.

Fairness: each client is charged the worker time that its slices took, and the client that has been charged least is
served next (start-time fair queueing; Goyal, Vin and Cheng, 1996). So a client of costly ten-crop slices gets half of
the workers beside a client of cheap ones, not most of them, and one that stops asking holds nobody up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from loader_service.types import SampleLayout, StageSeconds
from loader_service.wire.messages import Failed, Request, WorkerState

DEPTH: Final = 2
"""Leases a worker may hold: one in work and one waiting, so that it never waits for the dispatcher."""

CRASHES: Final = 3
"""After so many workers crashed on a lease its record is called bad: once may be chance, three times is the record."""

MAX_QUEUE: Final = 4096
"""Requests a client may have waiting; far more than its slots can hold, so only a broken client reaches it."""


NO_SECONDS: Final = StageSeconds()


@dataclass(eq=False)
class ClientRecord:
    """One client as the node sees it."""

    id: bytes
    name: str
    segment: str = ""  # of its shared memory; empty: slices go in frames
    queue: deque[Task] = field(default_factory=deque)
    charged_s: float = 0.0
    sending: int = 0  # send slots it occupies
    slices: int = 0
    samples: int = 0
    delivered_bytes: int = 0


@dataclass(eq=False)
class Task:
    """A request on its way: who asked, how often it was tried, what it was estimated to cost."""

    client: ClientRecord
    request: Request
    crashes: int = 0
    estimate_s: float = 0.0
    slot: int | None = None  # the send slot, for a request without a place


@dataclass(eq=False)
class WorkerRecord:
    """One worker process."""

    index: int
    pid: int = 0
    ready: bool = False
    tasks: dict[int, Task] = field(default_factory=dict)  # by lease id, the oldest first: the one in work
    slices: int = 0
    samples: int = 0
    busy_s: float = 0.0
    stages: StageSeconds = NO_SECONDS

    @property
    def state(self) -> WorkerState:
        """The state that follows from the fields; see the table at the top of this file."""
        if self.tasks:
            return WorkerState.WORKING
        return WorkerState.IDLE if self.ready and self.pid else WorkerState.STARTING


@dataclass(frozen=True)
class Grant:
    """Give a worker a lease."""

    worker: int
    lease: int
    task: Task


@dataclass(frozen=True)
class Answer:
    """Tell a client that its request is filled; with a slot, send the slice from there."""

    task: Task


@dataclass(frozen=True)
class Refuse:
    """Tell a client that its request cannot be filled."""

    client: bytes
    message: Failed


Action = Grant | Answer | Refuse


class Scheduler:
    """The state of a node.

    Args:
        workers: how many workers there are; they are numbered from 0.
        send_slots: how many slots there are for slices that go in frames.
    """

    def __init__(self, workers: int, send_slots: int) -> None:
        self.workers = [WorkerRecord(i) for i in range(workers)]
        self.clients: dict[bytes, ClientRecord] = {}
        self.reassigned = 0
        self.restarts = 0
        self.bad_samples = 0  # how often a record was called bad
        self.samples = 0  # delivered, also to clients that have left
        self.delivered_bytes = 0
        self._free_slots = list(range(send_slots))
        self._send_slots = send_slots
        self._next_lease = 0
        self._cost_s = 1e-4  # running mean of seconds per sample, to charge a lease before it is done

    # Clients

    def client_joined(self, client: bytes, name: str) -> list[Action]:
        """A client said hello. One that was known starts afresh: what it asked for before is forgotten."""
        self.client_left(client)
        floor = min((c.charged_s for c in self.clients.values()), default=0.0)
        self.clients[client] = ClientRecord(client, name, charged_s=floor)
        return []

    def client_attached(self, client: bytes, segment: str) -> list[Action]:
        """A client's shared memory can be written."""
        if client in self.clients:
            self.clients[client].segment = segment
        return []

    def client_left(self, client: bytes) -> list[Action]:
        """A client is gone; its waiting requests go, leases in work run out into nothing."""
        gone = self.clients.pop(client, None)
        if gone:
            for task in gone.queue:
                self._release_slot(task)
            gone.queue.clear()
        return self._dispatch()

    def requested(self, client: bytes, request: Request) -> list[Action]:
        """A client asks for a slice."""
        asking = self.clients.get(client)
        if asking is None:
            return []
        if request.place is not None and not asking.segment:
            return [Refuse(client, Failed(request.id, -1, "no shared memory is attached"))]
        if len(asking.queue) >= MAX_QUEUE:
            return [Refuse(client, Failed(request.id, -1, "too many requests are waiting"))]
        if not asking.queue:  # whoever was away has saved up nothing
            floor = min((c.charged_s for c in self.clients.values() if c.queue), default=asking.charged_s)
            asking.charged_s = max(asking.charged_s, floor)
        asking.queue.append(Task(asking, request))
        return self._dispatch()

    def slot_freed(self, slot: int, client: ClientRecord) -> list[Action]:
        """A send slot's bytes have left."""
        client.sending -= 1
        self._free_slots.append(slot)
        return self._dispatch()

    # Workers

    def worker_forked(self, index: int, pid: int) -> list[Action]:
        """A worker's process runs; it is not ready yet."""
        self.workers[index].pid = pid
        return []

    def worker_ready(self, index: int) -> list[Action]:
        """A worker has its datasets open."""
        self.workers[index].ready = True
        return self._dispatch()

    def worker_done(self, index: int, lease: int, seconds: float, stages: StageSeconds = NO_SECONDS) -> list[Action]:
        """A worker has written a slice; it took so many seconds, of which these went into its stages."""
        worker = self.workers[index]
        task = worker.tasks.pop(lease, None)
        if task is None:
            return []
        samples = task.request.what.count * task.request.what.view.samples_per_record
        worker.slices += 1
        worker.samples += samples
        worker.busy_s += seconds
        worker.stages += stages
        self._cost_s += (seconds / samples - self._cost_s) / 16
        task.client.charged_s += seconds - task.estimate_s
        if not self._present(task):
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
        """A worker cannot write a slice, because of a record or (-1) of something else."""
        task = self.workers[index].tasks.pop(lease, None)
        if task is None:
            return []
        return [*self._refuse(task, record, reason, source), *self._dispatch()]

    def worker_died(self, index: int, *, crashed: bool, record: int, how: str) -> list[Action]:
        """A worker's process is gone, and so are its locks: what it was leased goes to another.

        Args:
            index: which worker.
            crashed: whether it died by its own doing (a fault, an exception), not by somebody's kill.
            record: what it was working on, as it had published; -1 if nothing.
            how: for people, what became of it.
        """
        dead = self.workers[index]
        self.workers[index] = WorkerRecord(
            index, slices=dead.slices, samples=dead.samples, busy_s=dead.busy_s, stages=dead.stages
        )
        self.restarts += 1
        actions: list[Action] = []
        tasks = list(dead.tasks.values())
        if tasks and crashed:
            tasks[0].crashes += 1
            if tasks[0].crashes >= CRASHES:
                reason = f"it ended {CRASHES} workers, the last by {how}"
                actions += self._refuse(tasks.pop(0), record, reason)
        for task in reversed(tasks):
            if self._present(task):
                self.reassigned += 1
                task.client.charged_s -= task.estimate_s
                task.client.queue.appendleft(task)
            else:
                self._release_slot(task)
        return actions + self._dispatch()

    @property
    def leases(self) -> int:
        """How many leases are out."""
        return sum(len(worker.tasks) for worker in self.workers)

    @property
    def queued(self) -> int:
        """How many requests wait for a worker or for a send slot."""
        return sum(len(client.queue) for client in self.clients.values())

    @property
    def send_slots_used(self) -> int:
        """How many send slots hold a slice, in the making or on its way."""
        return self._send_slots - len(self._free_slots)

    # Inside

    def _dispatch(self) -> list[Action]:
        actions: list[Action] = []
        for worker in self._idle():
            task = self._next_task()
            if task is None:
                break
            lease, self._next_lease = self._next_lease, self._next_lease + 1
            what = task.request.what
            task.estimate_s = self._cost_s * what.count * what.view.samples_per_record
            task.client.charged_s += task.estimate_s
            worker.tasks[lease] = task
            actions.append(Grant(worker.index, lease, task))
        return actions

    def _idle(self) -> Iterator[WorkerRecord]:
        """Workers with room for a lease, the emptiest first, each as often as it has room."""
        for depth in range(DEPTH):
            for worker in self.workers:
                if worker.ready and len(worker.tasks) == depth:
                    yield worker

    def _next_task(self) -> Task | None:
        """The first request, of those that can be served now, of the client that was charged least."""
        share = max(1, self._send_slots // max(1, len(self.clients)))
        for client in sorted(self.clients.values(), key=lambda c: c.charged_s):
            if not client.queue:
                continue
            task = client.queue[0]
            if task.request.place is None and task.slot is None:
                if not self._free_slots or client.sending >= share:
                    continue
                task.slot = self._free_slots.pop()
                client.sending += 1
            return client.queue.popleft()
        return None

    def _present(self, task: Task) -> bool:
        """Whether the client that asked is still the same one."""
        return self.clients.get(task.client.id) is task.client

    def _refuse(self, task: Task, record: int, reason: str, source: str = "") -> list[Action]:
        self._release_slot(task)
        self.bad_samples += record >= 0
        if not self._present(task):
            return []
        return [Refuse(task.client.id, Failed(task.request.id, record, reason[:4096], source[:4096]))]

    def _release_slot(self, task: Task) -> None:
        if task.slot is not None:
            self._free_slots.append(task.slot)
            task.client.sending -= 1
            task.slot = None
