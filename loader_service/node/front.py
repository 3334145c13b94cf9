"""The front process of a node: the shell around the roster. It talks to clients, workers and the nursery.

One thread, one poll. A message comes in, the roster decides, the actions go out. Image bytes pass through here only for
clients on other machines, and then without being copied: from the send slot that a worker wrote into libzmq's hands.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zmq

from loader_service import defaults
from loader_service.errors import MessageError, NodeFailed, SharedMemoryError
from loader_service.link import messages, sockets
from loader_service.link.keys import Doorkeeper, NodeKeys
from loader_service.link.messages import Failed, Place, Request
from loader_service.link.slots import Hold, Segment, sweep
from loader_service.link.waker import Waker
from loader_service.metrics import NodeHook, NodeMetrics
from loader_service.node.lease import MAX_PACKET_BYTES, Bad, Died, Done, Forked, Lease, Ready, decode_answer, encode
from loader_service.node.nursery import Nursery
from loader_service.node.roster import Action, Answer, Client, Grant, Refuse, Roster, Task, Worker
from loader_service.node.watchdog import Watchdog, culprit
from loader_service.spec import STAGES, DatasetFacts, SampleLayout, Split

log = logging.getLogger("loader_service.node")

TICK_MS: Final = 500
MESSAGES_PER_TURN: Final = 64
"""Messages taken from clients before workers are looked at again, so that neither starves the other."""

BIRTHS_BEFORE_GIVING_UP: Final = 5
"""Workers that die before they were ready, one after another, until the node says that it cannot go on."""

ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True)
class Settings:
    """What a front is told at start."""

    bind: str
    workers: int
    send_slots: int
    slot_bytes: int = defaults.SEND_SLOT_BYTES
    client_silent_s: float = defaults.CLIENT_SILENT_S
    stall_s: float = defaults.STALL_S
    standstill_s: float = defaults.STANDSTILL_S
    keys: NodeKeys | None = None
    insecure: bool = False


class Front:
    """One node's front.

    Args:
        settings: see there.
        facts: of the splits that are served.
        nursery: forks the workers.
        own: the memory of the send slots.
        at: (workers, 2) int64, shared with the workers: the record and the stage each is working at, -1 for none.
        version: of the package, for status.
    """

    def __init__(
        self,
        settings: Settings,
        facts: dict[Split, DatasetFacts],
        nursery: Nursery,
        own: Segment,
        at: npt.NDArray[np.int64],
        version: str,
    ) -> None:
        self.instance = secrets.token_hex(16)
        self._settings, self._facts, self._nursery, self._at, self._version = settings, facts, nursery, at, version
        self._own = own
        self._roster = Roster(settings.workers, settings.send_slots)
        # Encoded once and sent without copying, so that a thousand Hellos of a client that does not read cost no memory.
        self._welcome = messages.encode(
            messages.Welcome(messages.PROTOCOL, self.instance, settings.workers, settings.slot_bytes, facts)
        )
        self._context: zmq.Context[Any] = zmq.Context()
        # Before the bind: from its first moment on, the socket asks somebody who may come in.
        self._doorkeeper = Doorkeeper(self._context, settings.keys) if settings.keys else None
        self._router, self.address = self._bind()
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._links: dict[int, socket.socket] = {}  # by worker index
        self._workers_by_fd: dict[int, int] = {}
        self._heard: dict[bytes, float] = {}  # by client: when it last gave a sign of life
        self._watch: dict[int, tuple[int, int, float]] = {}  # by worker: its lease and record, and since when
        self._watchdog = Watchdog(settings.standstill_s)
        # Send slots that libzmq has let go of, and when they were given to it; from its own thread.
        self._freed: deque[tuple[int, Client, float]] = deque()
        self._send_s = 0.0
        self._failed_births = 0
        self._due_births: list[tuple[float, int]] = []
        self._refused = 0
        self._started = time.monotonic()
        self._stopping = False

    # Life

    def _bind(self) -> tuple[zmq.Socket[bytes], str]:
        try:
            return sockets.bind_node(
                self._context, self._settings.bind, self._settings.keys, insecure=self._settings.insecure
            )
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def run(self, on_ready: Callable[[Front], None], hook: NodeHook | None = None) -> None:
        """Serve until SIGTERM or SIGINT; leaves no process, socket or segment behind.

        Args:
            on_ready: called once, when the first worker can work.
            hook: handed the node's metrics twice a second.

        Raises:
            NodeFailed: workers cannot start.
        """
        sweep()
        previous = {s: signal.signal(s, lambda *_: self.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._register()
            for index in range(self._settings.workers):
                self._fork(index)
            announced, next_tick = False, 0.0
            while not self._stopping:
                for descriptor, _ in self._poller.poll(TICK_MS):
                    self._handle(descriptor)
                if not announced and any(w.ready for w in self._roster.workers):
                    announced = True
                    on_ready(self)
                if (now := time.monotonic()) >= next_tick:
                    self._tick(now)
                    next_tick = now + TICK_MS / 1000
                    if hook:
                        hook(NodeMetrics.of(self.status()))
        finally:
            self._close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler."""
        self._stopping = True
        self._waker.wake()

    @property
    def memory_ceiling_bytes(self) -> int:
        """Most shared memory that this node itself takes: its send slots. Clients bring their own."""
        return self._settings.send_slots * self._settings.slot_bytes

    def _register(self) -> None:
        for item in (self._router, self._nursery.link.fileno(), self._waker.fileno()):
            self._poller.register(item, zmq.POLLIN)
        if self._doorkeeper:
            self._poller.register(self._doorkeeper.socket, zmq.POLLIN)

    def _close(self) -> None:
        self._nursery.close()  # first, so that no worker writes any more
        for link in self._links.values():
            link.close()
        self._router.close()
        if self._doorkeeper:
            self._doorkeeper.close()
        self._context.term()
        self._own.close()
        self._waker.close()

    # Events

    def _handle(self, item: Any) -> None:
        if item is self._router:
            self._hear_clients()
        elif self._doorkeeper and item is self._doorkeeper.socket:
            if stranger := self._doorkeeper.answer():
                self._refused += 1
                log.warning("a client at %s was refused: its key is not allowed", stranger)
        elif item == self._nursery.link.fileno():
            self._hear_nursery()
        elif item == self._waker.fileno():
            self._waker.clear()
            while self._freed:
                slot, client, since = self._freed.popleft()
                self._send_s += time.monotonic() - since
                self._do(self._roster.slot_freed(slot, client))
        elif item in self._workers_by_fd:
            self._hear_worker(self._workers_by_fd[item])

    def _hear_clients(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = self._router.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            client = frames[0]
            try:
                if len(frames) != 2:
                    raise MessageError(f"{len(frames) - 1} frames where one was expected")
                message = messages.decode_from_client(frames[1])
            except MessageError as error:
                self._refuse(client, str(error))
                continue
            self._answer(client, message)
            if client in self._roster.clients:
                self._heard[client] = time.monotonic()

    def _refuse(self, client: bytes, flaw: str) -> None:
        """Count a malformed message; tell of the first, the second, the fourth and so on, so that no log is flooded."""
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:
            log.warning("client %s: %r (%d refused so far)", client.hex()[:8], flaw, self._refused)

    def _answer(self, client: bytes, message: messages.FromClient) -> None:
        known = client in self._roster.clients
        match message:
            case messages.Hello():
                self._do(self._roster.client_joined(client, message.client))
                self._post(client, [self._welcome])
            case messages.StatusQuery():
                self._send(client, self.status())
            case messages.Bye():
                self._forget(client)
            case _ if not known:
                self._send(client, messages.Stranger())
            case messages.Ping():
                self._send(client, messages.Pong())
            case messages.Attach():
                self._attach(client, message.segment)
            case messages.Request():
                self._request(client, message)

    def _attach(self, client: bytes, name: str) -> None:
        try:
            segment = Segment.attach(name)
        except SharedMemoryError as error:
            self._send(client, messages.Attached(name, b"", str(error)[:4096]))
            return
        nonce = segment.nonce
        segment.close()
        self._do(self._roster.client_attached(client, name))
        self._send(client, messages.Attached(name, nonce))

    def _request(self, client: bytes, request: Request) -> None:
        if request.instance != self.instance:
            self._send(client, messages.Stranger())
            return
        if flaw := self._flaw(request):
            self._refused += 1
            self._send(client, Failed(request.id, -1, flaw))
            return
        self._do(self._roster.requested(client, request))

    def _flaw(self, request: Request) -> str:
        """Why a request cannot be served by anybody; empty if it can."""
        what = request.what
        facts = self._facts.get(request.split)
        if facts is None:
            return f"there is no split {request.split!r} here"
        if what.start + what.count > facts.count:
            return f"positions {what.start} to {what.start + what.count} are not within an epoch of {facts.count}"
        if what.view.jitter and not what.view.basis:
            return "the view's jitter basis is empty"
        need = _packed_bytes(SampleLayout(what.view, request.dtype), what.count)
        if request.place is None and need > self._settings.slot_bytes:
            return f"the slice needs {need} bytes, a send slot has {self._settings.slot_bytes}"
        return ""

    def _hear_worker(self, index: int) -> None:
        link = self._links[index]
        while True:
            try:
                packet = link.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it died with a lease unread; what it had said before can still be read
                continue
            if not packet:  # the nursery will tell how it died
                self._unlink(index)
                return
            match decode_answer(packet):
                case Ready():
                    self._failed_births = 0
                    self._do(self._roster.worker_ready(index))
                case Done(lease, seconds, stages):
                    self._do(self._roster.worker_done(index, lease, seconds, stages))
                case Bad(lease, record, reason, source):
                    self._do(self._roster.worker_failed(index, lease, record, reason, source))

    def _hear_nursery(self) -> None:
        match self._nursery.receive():
            case Forked(index, pid):
                self._do(self._roster.worker_forked(index, pid))
            case Died(index, pid, code):
                self._bury(index, pid, code)
            case None:
                raise NodeFailed("its nursery was killed, and with it the workers; start it again")

    def _bury(self, index: int, pid: int, code: int) -> None:
        if index in self._links:
            self._hear_worker(index)  # what it still said counts; at its end the link is let go
        if index in self._links:
            self._unlink(index)
        worker = self._roster.workers[index]
        record, self._at[index] = int(self._at[index, 0]), -1
        self._watch.pop(index, None)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        at = f" at record {record}" if record >= 0 else ""
        log.warning(
            "worker %d (pid %d) ended by %s%s; a new one takes its place",
            index,
            pid,
            how,
            at,
            extra={"worker": index, "pid": pid, "record": record},
        )
        self._failed_births = 0 if worker.ready else self._failed_births + 1
        if self._failed_births >= BIRTHS_BEFORE_GIVING_UP:
            raise NodeFailed(f"{BIRTHS_BEFORE_GIVING_UP} workers in a row ended before they were ready, by {how}")
        killed = code in (-signal.SIGKILL, -signal.SIGTERM)
        self._do(self._roster.worker_died(index, crashed=not killed, record=record, how=how))
        self._due_births.append(
            (time.monotonic() + (0.05 * 2**self._failed_births if self._failed_births else 0), index)
        )
        self._births(time.monotonic())

    def _tick(self, now: float) -> None:
        self._births(now)
        for client in [c for c, heard in self._heard.items() if now - heard > self._settings.client_silent_s]:
            log.warning(
                "client %s has been silent for %.0f s and is forgotten", client.hex()[:8], now - self._heard[client]
            )
            self._forget(client)
            sweep()
        for worker in self._roster.workers:
            self._watch_worker(worker.index, next(iter(worker.tasks), None), worker.pid, now)
        self._watch_all(now)

    def _watch_all(self, now: float) -> None:
        """Say once when nothing moves though something is asked for, and where it stands."""
        roster = self._roster
        asked = roster.leases + roster.queued
        state = (self._at.tobytes(), [w.slices for w in roster.workers], roster.bad_samples, self._send_s)
        still_s = self._watchdog.look(now, state, asked)
        if still_s is not None:
            found = culprit([self._worker_status(w) for w in roster.workers])
            log.warning(
                "nothing has moved for %.0f s though %d slices are asked for: %s",
                still_s,
                asked,
                found,
                extra=asdict(found),
            )

    def _watch_worker(self, index: int, lease: int | None, pid: int, now: float) -> None:
        """Kill a worker that has not moved on for too long: stopped, or hung in a read."""
        if lease is None:
            self._watch.pop(index, None)
            return
        record = int(self._at[index, 0])
        last = self._watch.get(index)
        if last is None or last[:2] != (lease, record):
            self._watch[index] = (lease, record, now)
        elif now - last[2] > self._settings.stall_s and pid:
            stage = self._worker_status(self._roster.workers[index]).stage
            log.warning(
                "worker %d (pid %d) has been at record %d for %.0f s: killed",
                index,
                pid,
                record,
                now - last[2],
                extra={"worker": index, "pid": pid, "record": record, "stage": stage},
            )
            self._watch.pop(index)
            os.kill(pid, signal.SIGKILL)

    # Actions

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Grant(worker, lease, task):
                    self._grant(worker, lease, task)
                case Answer(task):
                    self._deliver(task)
                case Refuse(client, message):
                    self._send(client, message)

    def _grant(self, worker: int, lease: int, task: Task) -> None:
        request = task.request
        if task.slot is None:
            assert request.place is not None
            segment, place = task.client.segment, request.place
        else:
            generation = self._own.arm(task.slot)
            if generation is None:
                raise NodeFailed(f"send slot {task.slot} is locked, though the worker that had it is gone")
            segment, place = self._own.name, self._place(task, generation)
        packet = encode(Lease(lease, request.split, request.what, request.dtype, segment, place))
        try:
            self._links[worker].send(packet)
        except (BrokenPipeError, ConnectionResetError, KeyError):
            return  # it has died; the nursery's report will lease this again

    def _deliver(self, task: Task) -> None:
        request = task.request
        filled = messages.encode(messages.Filled(request.id))
        if task.slot is None:
            self._post(task.client.id, [filled])
            return
        place, n = self._place(task, 0), request.what.count
        layout = SampleLayout(request.what.view, request.dtype)
        end = place.draws + layout.draws_bytes * n
        hold = Hold(
            self._own.array(place.images, (end - place.images,), np.uint8),
            partial(self._free, task.slot, task.client, time.monotonic()),
        )
        whole = np.asarray(hold)
        del hold
        images = whole[: layout.image_bytes * n]
        tail = [
            whole[at - place.images :][:size].tobytes()
            for at, size in ((place.labels, 8 * n), (place.draws, layout.draws_bytes * n))
        ]
        self._post(task.client.id, [filled, images, b"".join(tail)])

    def _free(self, slot: int, client: Client, since: float) -> None:
        """A send slot's bytes have left; called by whichever thread let go of them last."""
        self._freed.append((slot, client, since))
        self._waker.wake()

    def _place(self, task: Task, generation: int) -> Place:
        """Where in its send slot a slice lies: pixels, labels and draws, each from an aligned offset."""
        assert task.slot is not None
        layout, n = SampleLayout(task.request.what.view, task.request.dtype), task.request.what.count
        images = self._own.data_offset + task.slot * self._settings.slot_bytes
        labels = _align(images + layout.image_bytes * n)
        return Place(task.slot, generation, images, labels, draws=_align(labels + 8 * n))

    def _send(self, client: bytes, message: messages.FromNode) -> None:
        self._post(client, [messages.encode(message)])

    def _post(self, client: bytes, frames: list[Any]) -> None:
        sockets.try_send(self._router, [client, *frames], on_gone=lambda: self._forget(client))

    def _forget(self, client: bytes) -> None:
        self._heard.pop(client, None)
        self._do(self._roster.client_left(client))

    def _fork(self, index: int) -> None:
        link = self._nursery.fork_worker(index)
        self._links[index] = link
        self._workers_by_fd[link.fileno()] = index
        self._poller.register(link.fileno(), zmq.POLLIN)

    def _unlink(self, index: int) -> None:
        link = self._links.pop(index)
        self._poller.unregister(link.fileno())
        del self._workers_by_fd[link.fileno()]
        link.close()

    def _births(self, now: float) -> None:
        due = [index for at, index in self._due_births if at <= now]
        self._due_births = [birth for birth in self._due_births if birth[0] > now]
        for index in due:
            self._fork(index)

    # Self-description

    def status(self) -> messages.Status:
        """The node as it is now."""
        roster = self._roster
        return messages.Status(
            protocol=messages.PROTOCOL,
            instance=self.instance,
            version=self._version,
            address=self.address,
            uptime_s=time.monotonic() - self._started,
            memory_ceiling_bytes=self.memory_ceiling_bytes,
            splits={split: facts.fingerprint for split, facts in self._facts.items()},
            workers=tuple(self._worker_status(w) for w in roster.workers),
            clients=tuple(
                messages.ClientStatus(
                    c.name, "shm" if c.segment else "tcp", len(c.queue), c.slices, c.samples, c.delivered_bytes
                )
                for c in roster.clients.values()
            ),
            leases=roster.leases,
            reassigned=roster.reassigned,
            restarts=roster.restarts,
            refused=self._refused,
            queued=roster.queued,
            samples=roster.samples,
            delivered_bytes=roster.delivered_bytes,
            bad_samples=roster.bad_samples,
            send_slots=self._settings.send_slots,
            send_slots_used=roster.send_slots_used,
            send_s=self._send_s,
        )

    def _worker_status(self, worker: Worker) -> messages.WorkerStatus:
        state = "working" if worker.tasks else "idle" if worker.ready else "starting"
        record, stage = self._at[worker.index].tolist()
        return messages.WorkerStatus(
            worker.pid,
            state,
            worker.slices,
            worker.samples,
            worker.busy_s,
            worker.stages,
            STAGES[stage] if stage in range(len(STAGES)) else "",
            record,
        )


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _packed_bytes(layout: SampleLayout, n: int) -> int:
    """Bytes that a slice takes in a send slot."""
    return _align(_align(layout.image_bytes * n) + 8 * n) + layout.draws_bytes * n
