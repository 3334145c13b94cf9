"""The dispatcher of a node: the shell around the scheduler. It talks to clients, workers and the fork server.

One thread, one poll. A message comes in, the scheduler decides, the actions go out. Image bytes pass through here only for
clients on other machines, and then without being copied: from the send slot that a worker wrote into libzmq's hands.
"""

from __future__ import annotations

import logging
import mmap
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zmq

from loader_service import defaults
from loader_service.errors import MessageError, NodeFailed, SharedMemoryError
from loader_service.metrics import NodeHook, NodeMetrics
from loader_service.node.forkserver import ForkServer
from loader_service.node.packets import Bad, Done, Forked, Lease, Ready
from loader_service.node.scheduler import Action, Answer, Grant, Refuse, Scheduler, Task, WorkerRecord
from loader_service.node.send_buffers import SendBuffers
from loader_service.node.watchdog import Watchdog, culprit
from loader_service.node.worker import NO_RECORD, Worker, prove, survey
from loader_service.node.worker_pool import Death, Event, WorkerPool
from loader_service.types import DatasetFacts, Installation, Split
from loader_service.wire import messages, sockets
from loader_service.wire.auth import Authenticator, NodeKeys, node_keys
from loader_service.wire.messages import Failed, Request
from loader_service.wire.shm import Segment, sweep
from loader_service.wire.sockets import Waker

log = logging.getLogger("loader_service.node")

TICK_MS: Final = 500
MAX_CLIENTS: Final = 256
"""More than any cluster has trainers; whoever says hello under ever new names reaches it, and costs no more."""

MESSAGES_PER_TURN: Final = 64
"""Messages taken from clients before workers are looked at again, so that neither starves the other."""


@dataclass(frozen=True)
class Settings:
    """What a dispatcher is told at start."""

    bind: str
    workers: int
    send_slots: int
    slot_bytes: int = defaults.SEND_SLOT_BYTES
    client_silent_s: float = defaults.CLIENT_SILENT_S
    stall_s: float = defaults.STALL_S
    standstill_s: float = defaults.STANDSTILL_S
    keys: NodeKeys | None = None
    insecure: bool = False
    io_threads: int = defaults.CONNECTIONS


class Dispatcher:
    """One node's dispatcher.

    Args:
        settings: see there.
        facts: of the splits that are served.
        installation: what makes them.
        fork_server: forks the workers.
        own: the memory of the send slots.
        at: (workers, 2) int64, shared with the workers: the record and the stage each is working at, -1 for none.
        version: of the package, for status.
    """

    def __init__(
        self,
        settings: Settings,
        facts: dict[Split, DatasetFacts],
        installation: Installation,
        fork_server: ForkServer,
        own: Segment,
        at: npt.NDArray[np.int64],
        version: str,
    ) -> None:
        self.instance = secrets.token_hex(16)
        self._settings, self._facts, self._version = settings, facts, version
        self._scheduler = Scheduler(settings.workers, settings.send_slots)
        # Encoded once and sent without copying, so that a thousand Hellos of a client that does not read cost no memory.
        self._welcome = messages.encode(
            messages.Welcome(
                messages.PROTOCOL, self.instance, settings.workers, settings.slot_bytes, installation, facts
            )
        )
        self._context: zmq.Context[Any] = zmq.Context(io_threads=settings.io_threads)
        # Before the bind: from its first moment on, the socket asks somebody who may come in.
        self._authenticator = Authenticator(self._context, settings.keys) if settings.keys else None
        self._router, self.address = self._bind()
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        if self._authenticator:
            self._poller.register(self._authenticator.socket, zmq.POLLIN)
        self._last_heard: dict[bytes, float] = {}  # by client: when it last gave a sign of life
        self._watchdog = Watchdog(settings.standstill_s)
        self._send_buffers = SendBuffers(own, settings.slot_bytes, self._waker.wake)
        self._worker_pool = WorkerPool(fork_server, at, self._poller, settings.stall_s)
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

    def run(self, on_ready: Callable[[Dispatcher], None], hook: NodeHook | None = None) -> None:
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
            announced, next_tick = False, 0.0
            while not self._stopping:
                for descriptor, _ in self._poller.poll(TICK_MS):
                    self._handle(descriptor)
                if not announced and any(w.ready for w in self._scheduler.workers):
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

    def _close(self) -> None:
        self._worker_pool.close()  # first, so that no worker writes any more
        self._router.close()
        if self._authenticator:
            self._authenticator.close()
        self._context.term()
        self._send_buffers.close()
        self._waker.close()

    # Events

    def _handle(self, item: Any) -> None:
        if item is self._router:
            self._receive_from_clients()
        elif self._authenticator and item is self._authenticator.socket:
            if stranger := self._authenticator.answer():
                self._refused += 1
                log.warning("a client at %s was refused: its key is not allowed", stranger)
        elif item == self._waker.fileno():
            self._waker.clear()
            for slot, client in self._send_buffers.freed():
                self._do(self._scheduler.slot_freed(slot, client))
        else:
            for index, event in self._worker_pool.receive(item):
                self._worker_event(index, event)

    def _receive_from_clients(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = self._router.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            client, lane = frames[0][: messages.CLIENT_ID_BYTES], frames[0][messages.CLIENT_ID_BYTES :]
            try:
                if len(frames) != 2:
                    raise MessageError(f"{len(frames) - 1} frames where one was expected")
                message = messages.decode_from_client(frames[1])
                if lane and not isinstance(message, messages.Ping):
                    raise MessageError(f"{type(message).__name__} came by a lane, which is there for slices")
            except MessageError as error:
                self._refuse(client, str(error))
                continue
            if lane:
                self._send(frames[0], messages.Pong())
            else:
                self._answer(client, message)
            if client in self._scheduler.clients:
                self._last_heard[client] = time.monotonic()

    def _refuse(self, client: bytes, flaw: str) -> None:
        """Count a malformed message; tell of the first, the second, the fourth and so on, so that no log is flooded."""
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:
            log.warning("client %s: %r (%d refused so far)", client.hex()[:8], flaw, self._refused)

    def _answer(self, client: bytes, message: messages.FromClient) -> None:
        known = client in self._scheduler.clients
        match message:
            case messages.Hello() if not known and len(self._scheduler.clients) >= MAX_CLIENTS:
                self._refuse(client, f"there are {MAX_CLIENTS} clients already")
            case messages.Hello():
                self._do(self._scheduler.client_joined(client, message.client))
                self._post(client, [self._welcome])
            case messages.StatusQuery():
                self._send(client, self.status())
            case messages.Bye():
                self._forget(client)
            case _ if not known:
                self._send(client, messages.UnknownClient())
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
        self._do(self._scheduler.client_attached(client, name))
        self._send(client, messages.Attached(name, nonce))

    def _request(self, client: bytes, request: Request) -> None:
        if request.instance != self.instance:
            self._send(client, messages.UnknownClient())
            return
        if flaw := self._flaw(request):
            self._refused += 1
            self._send(client, Failed(request.id, -1, flaw))
            return
        self._do(self._scheduler.requested(client, request))

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
        if request.place is None and not self._send_buffers.fits(request):
            return f"the slice is larger than a send slot of {self._send_buffers.slot_bytes} bytes"
        return ""

    def _worker_event(self, index: int, event: Event) -> None:
        scheduler = self._scheduler
        match event:
            case Forked(_, pid):
                self._do(scheduler.worker_forked(index, pid))
            case Ready():
                self._do(scheduler.worker_ready(index))
            case Done(lease, seconds, stages):
                self._do(scheduler.worker_done(index, lease, seconds, stages))
            case Bad(lease, record, reason, source):
                self._do(scheduler.worker_failed(index, lease, record, reason, source))
            case Death(crashed, record, how):
                self._do(scheduler.worker_died(index, crashed=crashed, record=record, how=how))

    def _tick(self, now: float) -> None:
        self._worker_pool.spawn_due(now)
        for client in [c for c, heard in self._last_heard.items() if now - heard > self._settings.client_silent_s]:
            log.warning(
                "client %s has been silent for %.0f s and is forgotten",
                client.hex()[:8],
                now - self._last_heard[client],
            )
            self._forget(client)
            sweep()
        for worker in self._scheduler.workers:
            self._worker_pool.kill_if_stalled(worker.index, worker.pid, next(iter(worker.tasks), None), now)
        self._report_standstill(now)

    def _report_standstill(self, now: float) -> None:
        """Say once when nothing moves though something is asked for, and where it stands."""
        scheduler = self._scheduler
        asked = scheduler.leases + scheduler.queued
        state = (
            self._worker_pool.trace(),
            [w.slices for w in scheduler.workers],
            scheduler.bad_samples,
            self._send_buffers.send_s,
        )
        still_s = self._watchdog.look(now, state, asked)
        if still_s is not None:
            found = culprit([self._worker_status(w) for w in scheduler.workers])
            log.warning(
                "nothing has moved for %.0f s though %d slices are asked for: %s",
                still_s,
                asked,
                found,
                extra=asdict(found),
            )

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
            own = self._send_buffers.place(task)
            if own is None:
                raise NodeFailed(f"send slot {task.slot} is locked, though the worker that had it is gone")
            segment, place = self._send_buffers.segment_name, own
        self._worker_pool.give(worker, Lease(lease, request.split, request.what, request.dtype, segment, place))

    def _deliver(self, task: Task) -> None:
        if task.slot is None:
            self._send(task.client.id, messages.Filled(task.request.id))
            return
        for frames in self._send_buffers.messages(task):
            if not self._post(messages.lane_id(task.client.id, task.request.lane), frames):
                return

    def _send(self, client: bytes, message: messages.FromNode) -> None:
        self._post(client, [messages.encode(message)])

    def _post(self, client: bytes, frames: list[Any]) -> bool:
        """Send to a client, or to a lane of its; False if it is not there, and then it is forgotten."""
        owner = client[: messages.CLIENT_ID_BYTES]
        return sockets.try_send(self._router, [client, *frames], on_gone=lambda: self._forget(owner))

    def _forget(self, client: bytes) -> None:
        self._last_heard.pop(client, None)
        self._do(self._scheduler.client_left(client))

    # Self-description

    def status(self) -> messages.Status:
        """The node as it is now."""
        scheduler = self._scheduler
        return messages.Status(
            protocol=messages.PROTOCOL,
            instance=self.instance,
            version=self._version,
            address=self.address,
            uptime_s=time.monotonic() - self._started,
            memory_ceiling_bytes=self.memory_ceiling_bytes,
            splits={split: facts.fingerprint for split, facts in self._facts.items()},
            workers=tuple(self._worker_status(w) for w in scheduler.workers),
            clients=tuple(
                messages.ClientStatus(
                    c.name, "shm" if c.segment else "tcp", len(c.queue), c.slices, c.samples, c.delivered_bytes
                )
                for c in scheduler.clients.values()
            ),
            leases=scheduler.leases,
            reassigned=scheduler.reassigned,
            restarts=scheduler.restarts,
            refused=self._refused,
            queued=scheduler.queued,
            samples=scheduler.samples,
            delivered_bytes=scheduler.delivered_bytes,
            bad_samples=scheduler.bad_samples,
            send_slots=self._settings.send_slots,
            send_slots_used=scheduler.send_slots_used,
            send_s=self._send_buffers.send_s,
        )

    def _worker_status(self, worker: WorkerRecord) -> messages.WorkerStatus:
        record, stage = self._worker_pool.at(worker.index)
        return messages.WorkerStatus(
            worker.pid,
            worker.state,
            worker.slices,
            worker.samples,
            worker.busy_s,
            worker.stages,
            stage,
            record,
        )


OnReady = Callable[[Dispatcher, dict[Split, DatasetFacts]], None]


def run_node(
    data: Path,
    *,
    workers: int,
    bind: str,
    version: str,
    on_ready: OnReady,
    keys: Path | None = None,
    insecure: bool = False,
    io_threads: int = defaults.CONNECTIONS,
    hook: NodeHook | None = None,
) -> None:
    """Run a node until it is told to stop. The calling process must have one thread.

    Args:
        data: directory of train.lmdb and val.lmdb; one of them may be missing.
        workers: how many worker processes.
        bind: address to listen at.
        version: of the package.
        on_ready: called when the node can serve, with the dispatcher and what it serves.
        keys: directory of the node's keys; without it only this machine may reach ``bind``.
        insecure: let other machines reach it without keys all the same.
        io_threads: of libzmq, which send slices to other machines.
        hook: handed the node's metrics twice a second; the first time after the workers' parent has been forked, so
            that it may start threads.

    Raises:
        LoaderServiceError: it cannot start or go on; see the sentence.
    """
    may_enter = node_keys(keys) if keys else None
    installation, facts = prove(), survey(data)
    shared = mmap.mmap(-1, workers * 2 * 8)  # anonymous and shared: the workers inherit it through both forks
    at = np.frombuffer(shared, np.int64).reshape(workers, 2)
    at[:] = NO_RECORD

    slots = defaults.SEND_SLOTS_PER_WORKER * workers + 1
    # Without a name, since only this node's processes use it; so it needs no room in /dev/shm and leaves nothing there.
    own = Segment.create(slots * defaults.SEND_SLOT_BYTES, slots, named=False, reserve=False)

    def worker_main(index: int, link: socket.socket) -> None:
        Worker(link, data, facts, own, at[index]).run()

    fork_server = ForkServer(worker_main)
    try:
        settings = Settings(bind, workers, send_slots=slots, keys=may_enter, insecure=insecure, io_threads=io_threads)
        dispatcher = Dispatcher(settings, facts, installation, fork_server, own, at, version)
    except BaseException:
        fork_server.close()
        raise
    dispatcher.run(lambda ready: on_ready(ready, facts), hook)
