"""The dispatcher: the main loop of a node, which does the I/O for the scheduler.

It runs in one thread with one poll. A message from a client or an event of a worker comes in, the scheduler decides, and
the dispatcher carries out the actions:

    clients  -- ROUTER -->  Dispatcher  -- events -->   Scheduler
    clients  <- ROUTER --   Dispatcher  <- actions --   Scheduler
    workers  <- links -->   WorkerPool  -- events -->   Dispatcher

Pixels pass through this process only for clients without shared memory, and then without a copy: libzmq sends them from
the send slot that a worker wrote. :func:`run_node`, at the end of this file, puts a node together.
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
from loader_service.node.scheduler import (
    Action,
    Answer,
    ClientSegment,
    Detach,
    Grant,
    Refuse,
    Scheduler,
    Task,
    WorkerRecord,
)
from loader_service.node.send_buffers import SendBuffers, messages_per_slice
from loader_service.node.watchdog import Watchdog, culprit
from loader_service.node.worker import NO_RECORD, Worker, prove, share_checked, survey
from loader_service.node.worker_pool import Death, Event, WorkerPool
from loader_service.types import DatasetFacts, Installation, Split
from loader_service.wire import messages, sockets
from loader_service.wire.access import keys_to_serve
from loader_service.wire.auth import Authenticator, NodeKeys, RefusalLog
from loader_service.wire.descriptors import ConnectionGate, raise_limit
from loader_service.wire.messages import Attach, Attached, Failed, Request
from loader_service.wire.shm import Segment, SegmentWatch, sweep
from loader_service.wire.sockets import Waker

log = logging.getLogger("loader_service.node")

TICK_MS: Final = 500
"""Period of the checks for killed and silent clients, stalled workers and standstills, and of the metrics hook."""

MAX_CLIENTS: Final = 256
"""Upper bound of the clients of a node. No cluster has so many trainers; the bound limits the memory that a peer can
take by Hellos under new identities."""

CANNOT_ATTACH: Final = "the node cannot open it: it runs on another machine, in another container or as another user; or it has barred this client"
"""The reason in every Attached that refuses. It does not tell the causes apart, so no client can use it to look for segments."""

SWEEP_FOR_S: Final = 5.0
"""Seconds during which every tick looks for orphans after a client was lost. A killed process's connection can end before its
other files are closed, and with them the lock that shows that its segment has an owner."""

MAX_NOTICES: Final = 4 * MAX_CLIENTS
"""Upper bound of the peers that the node remembers to have told that it does not know them."""

EXHAUSTED_EVERY_S: Final = 60.0
"""Seconds between two log lines about connections that are closed for lack of descriptors."""

SPARE_MESSAGES: Final = 64
"""Messages besides slices and answers that may wait for a client: a Pong for each second of a slow transfer."""

MESSAGES_PER_TURN: Final = 64
"""Messages read from clients before the loop polls again, so that many clients cannot starve the workers."""


@dataclass(frozen=True)
class Settings:
    """The settings of a dispatcher; for the defaults and their reasons see ``defaults.py``.

    Fields:
        bind: address to listen at.
        workers: number of workers.
        send_slots, slot_bytes: number and size of the slots for slices in frames.
        client_silent_s: silence after which a client is forgotten.
        stall_s: time at one record after which a worker is killed.
        standstill_s: time without progress after which the log names the place.
        keys: the node's keys; None serves everybody who can connect.
        io_threads: I/O threads of libzmq.
        checked_bytes: shared memory in which workers note which records they compared with their checksums.
    """

    bind: str
    workers: int
    send_slots: int
    slot_bytes: int = defaults.SEND_SLOT_BYTES
    client_silent_s: float = defaults.CLIENT_SILENT_S
    stall_s: float = defaults.WORKER_STALL_S
    standstill_s: float = defaults.STALL_WARNING_S
    keys: NodeKeys | None = None
    io_threads: int = defaults.CONNECTIONS
    checked_bytes: int = 0


class Dispatcher:
    """The dispatcher of one node.

    Args:
        settings: its settings.
        facts: the facts of the splits that it serves.
        installation: golden hash and libraries of this installation.
        fork_server: forks the workers.
        own: the memory of the send slots.
        progress: (workers, 2) int64 shared with the workers: the record and the index of the stage of each, -1 for none.
        version: version of the package, for the status.
    """

    def __init__(
        self,
        settings: Settings,
        facts: dict[Split, DatasetFacts],
        installation: Installation,
        fork_server: ForkServer,
        own: Segment,
        progress: npt.NDArray[np.int64],
        version: str,
    ) -> None:
        self.instance = secrets.token_hex(16)
        self._settings, self._facts, self._version = settings, facts, version
        self._scheduler = Scheduler(settings.workers, settings.send_slots)
        # Encoded once and sent without a copy: a thousand Hellos of a client that does not read must not cost memory.
        self._welcome = messages.encode(
            messages.Welcome(
                messages.PROTOCOL, self.instance, settings.workers, settings.slot_bytes, installation, facts
            )
        )
        self._context: zmq.Context[Any] = zmq.Context(io_threads=settings.io_threads)
        # Before the bind, since libzmq asks the authenticator about the first connection already.
        self._authenticator = Authenticator(self._context, settings.keys) if settings.keys else None
        self._refusals = RefusalLog()
        self._router, self.address = self._bind()
        self._gate = ConnectionGate(self._router, self.address, settings.workers)
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._gate.socket, zmq.POLLIN)
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        if self._authenticator:
            self._poller.register(self._authenticator.socket, zmq.POLLIN)
        self._last_heard: dict[bytes, float] = {}  # time of the last message, by client
        # By client and name; the scheduler's Detach removes them.
        self._segments: dict[tuple[bytes, str], SegmentWatch] = {}
        self._noticed: dict[bytes, None] = {}  # unknown peers that were told so, the oldest first
        self._excess, self._excess_logged = 0, -EXHAUSTED_EVERY_S  # connections closed since the last line, its time
        self._watchdog = Watchdog(settings.standstill_s)
        self._send_buffers = SendBuffers(own, settings.slot_bytes, self._waker.wake)
        self._worker_pool = WorkerPool(fork_server, progress, self._poller, settings.stall_s)
        self._sweep_until = 0.0  # see SWEEP_FOR_S
        self._refused = 0  # messages, requests and keys; see Status
        self._started = time.monotonic()
        self._stopping = False

    # Start and stop

    def _bind(self) -> tuple[zmq.Socket[bytes], str]:
        try:
            settings = self._settings
            # A client has at most these: all slots with slices for it, and one answer to each of its requests. The rest is
            # for heartbeats. A client for which more wait does not read.
            slices = settings.send_slots * messages_per_slice(settings.slot_bytes)
            unread = slices + settings.workers * defaults.ASKS_PER_WORKER + SPARE_MESSAGES
            return sockets.bind_node(self._context, settings.bind, settings.keys, unread_messages=unread)
        except BaseException:
            self._context.destroy(linger=0)  # a context with an open socket would block at its garbage collection
            raise

    def run(self, on_ready: Callable[[Dispatcher], None], hook: NodeHook | None = None) -> None:
        """Serve until SIGTERM or SIGINT, and leave no process, socket or segment.

        Args:
            on_ready: called once, when the first worker is ready.
            hook: called with the node's metrics twice a second.

        Raises:
            NodeFailed: workers cannot start.
        """
        sweep()  # segments of clients that were killed on this machine
        # A handler only sets a flag and wakes the poll; the loop itself cleans up.
        previous = {s: signal.signal(s, lambda *_: self.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            announced, next_tick = False, 0.0  # so the first round ticks
            while not self._stopping:
                for descriptor, _ in self._poller.poll(TICK_MS):
                    self._handle(descriptor)
                # A client that connected earlier is queued; only people and scripts wait for the announcement.
                if not announced and any(w.ready for w in self._scheduler.workers):
                    announced = True
                    on_ready(self)
                if (now := time.monotonic()) >= next_tick:  # busy polls return earlier than TICK_MS
                    self._tick(now)
                    next_tick = now + TICK_MS / 1000
                    if hook:
                        hook(NodeMetrics.of(self.status()))
        finally:
            self._close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """End the loop. Safe to call in a signal handler."""
        self._stopping = True
        self._waker.wake()  # the signal may come between the loop's check and its poll, which would then sleep

    @property
    def client_bytes(self) -> int:
        """Upper bound of the memory of one client's requests, in bytes: in its queue, and in libzmq by all its lanes."""
        unread = sockets.UNREAD_REQUESTS * messages.MAX_CLIENT_MESSAGE_BYTES * messages.MAX_CONNECTIONS
        return self._scheduler.queue_bytes + unread

    @property
    def memory_ceiling_bytes(self) -> int:
        """Upper bound of the shared memory of this node, in bytes: send slots and a bit per record. Clients own the rest."""
        return self._settings.send_slots * self._settings.slot_bytes + self._settings.checked_bytes

    def _close(self) -> None:
        self._warn(self._refusals.due(time.monotonic(), closing=True))
        self._worker_pool.close()  # first, so that no worker writes into a closed segment
        self._gate.close()
        self._router.close()
        if self._authenticator:
            self._authenticator.close()
        self._context.term()  # waits for libzmq's threads, which may still read a send slot
        for segment in self._segments.values():
            segment.close()
        self._send_buffers.close()

    # Events

    def _handle(self, item: Any) -> None:
        if item is self._router:  # poll returns a ZeroMQ socket as itself, any other descriptor as a number
            self._receive_from_clients()
        elif item is self._gate.socket:
            self._excess += self._gate.close_excess()
            self._report_excess(time.monotonic())
        elif self._authenticator and item is self._authenticator.socket:
            if refusal := self._authenticator.answer():
                self._refused += 1
                self._warn(self._refusals.add(refusal, time.monotonic()))
        elif item == self._waker.fileno():
            self._waker.clear()  # before freed(), so that a slot freed in between wakes the loop again
            for slot, client in self._send_buffers.freed():
                self._do(self._scheduler.slot_freed(slot, client))
        else:
            for index, event in self._worker_pool.receive(item):
                self._worker_event(index, event)

    def _receive_from_clients(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = self._router.recv_multipart(zmq.DONTWAIT)  # copied: MAXMSGSIZE keeps them small
            except zmq.Again:
                return
            # ROUTER prepends the routing identity: 16 bytes for a client, one more for each of its lanes.
            client, lane = frames[0][: messages.CLIENT_ID_BYTES], frames[0][messages.CLIENT_ID_BYTES :]
            try:
                if len(frames) != 2:
                    raise MessageError(f"{len(frames) - 1} frames where one was expected")
                message = messages.decode_from_client(frames[1])
                if lane and not isinstance(message, messages.Ping):
                    raise MessageError(f"{type(message).__name__} came over a lane, which is for slices only")
            except MessageError as error:
                # A Hello of another version may have fields that this version does not know.
                version = messages.protocol_of(frames[1]) if len(frames) == 2 and not lane else None
                if version is None or version == messages.PROTOCOL:
                    self._refuse(client, str(error))
                else:
                    self._turn_away(client, version)
                continue
            if lane:  # also for an unknown client, which learns that over lane 0
                self._send(frames[0], messages.Pong())
            else:
                self._answer(client, message)
            if client in self._scheduler.clients:  # any message counts as a sign of life
                self._last_heard[client] = time.monotonic()  # known clients only, so MAX_CLIENTS bounds the dict

    def _refuse(self, client: bytes, flaw: str) -> None:
        """Count a refused message. Log the 1st, 2nd, 4th, 8th and so on, so that a broken client cannot flood the log."""
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # a power of two
            # %r escapes what the client may have put into the text.
            log.warning("client %s: %r (%d refused so far)", client.hex()[:8], flaw, self._refused)

    def _turn_away(self, client: bytes, version: int) -> None:
        """Answer the Hello of a client that the node does not take; ``version`` is the client's."""
        reason = f"it has {MAX_CLIENTS} clients already, which is the most that it takes"
        if version != messages.PROTOCOL:
            advice = messages.advice(messages.PROTOCOL, version)
            reason = f"it speaks protocol {messages.PROTOCOL}, the client protocol {version}; {advice}"
        self._refuse(client, f"its Hello is refused: {reason}")
        self._send(client, messages.Refused(messages.PROTOCOL, reason))

    def _answer(self, client: bytes, message: messages.FromClient) -> None:
        known = client in self._scheduler.clients
        # The order matters: the cases above `not known` are open to unknown clients, those below are not.
        match message:
            case messages.Hello(version) if version != messages.PROTOCOL or (
                not known and len(self._scheduler.clients) >= MAX_CLIENTS
            ):
                self._turn_away(client, version)
            case messages.Hello():
                self._noticed.pop(client, None)
                self._do(self._scheduler.client_joined(client, message.client))
                self._post(client, [self._welcome])
            case messages.StatusQuery():
                self._send(client, self.status())
            case messages.Bye():
                self._remove(client)
            case _ if not known:
                self._notice(client)
            case messages.Ping():
                self._send(client, messages.Pong())
            case messages.Attach():
                self._attach(client, message)
            case messages.Request():
                self._request(client, message)

    def _notice(self, client: bytes) -> None:
        """Tell a peer once that it must say Hello: its requests that follow are lost, too, and would cause one notice each."""
        if client not in self._noticed:
            while len(self._noticed) >= MAX_NOTICES:
                del self._noticed[next(iter(self._noticed))]  # the oldest; if it sends again, it is told again
            self._noticed[client] = None
            self._send(client, messages.UnknownClient())

    def _attach(self, client: bytes, message: Attach) -> None:
        """Open a client's segment, to check it and to watch it. The workers map it when a lease names it."""
        name, layout = message.segment, message.layout
        try:
            if self._scheduler.clients[client].barred:
                raise SharedMemoryError("the client is barred")
            segment = SegmentWatch(name, message.nonce, layout.slots * layout.slot_bytes, layout.parts)
            if self._gate.in_reserve(segment.fileno()):
                segment.close()
                raise SharedMemoryError("too few descriptors are left")
        except SharedMemoryError as error:
            # Not a refused message: every client on another machine tries.
            log.debug("client %s does not share memory with this node: %s", client.hex()[:8], error)
            self._send(client, Attached(name, accepted=False, reason=CANNOT_ATTACH))
            return
        if again := self._segments.get((client, name)):
            again.close()
        self._segments[client, name] = segment
        self._do(self._scheduler.client_attached(client, ClientSegment(name, segment.data_offset, layout)))
        self._send(client, Attached(name, accepted=True))

    def _request(self, client: bytes, request: Request) -> None:
        if request.instance != self.instance:  # it was queued for another run of this node
            self._notice(client)
            return
        if flaw := self._flaw(request):
            self._refused += 1
            self._send(client, Failed(request.id, -1, flaw))
            return
        self._do(self._scheduler.requested(client, request))

    def _flaw(self, request: Request) -> str:
        """Return the reason why no worker can serve a request; empty if one can."""
        what = request.what
        facts = self._facts.get(request.split)
        if facts is None:
            return f"this node has no split {request.split!r}"
        if what.start + what.count > facts.count:
            return f"positions {what.start} to {what.start + what.count} are outside of an epoch of {facts.count}"
        if what.view.jitter and not what.view.basis:  # the client completes a view before it sends one
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
                # Before worker_died, which would lease the slice to the next worker.
                crashed = crashed and not self._bar_if_flawed(next(iter(scheduler.workers[index].tasks.values()), None))
                self._do(scheduler.worker_died(index, crashed=crashed, record=record, how=how))

    def _bar_if_flawed(self, task: Task | None) -> bool:
        """Bar the client of the task that a dead worker wrote if its segment is the cause; return whether it is."""
        if task is None or task.segment is None:
            return False
        segment = self._segments.get((task.client.id, task.segment.name))
        if segment is None or not (flaw := segment.flaw()):
            return False
        self._bar(task.client.id, flaw)
        return True

    def _bar(self, client: bytes, flaw: str) -> None:
        log.warning("client %s: %s; this node writes no more of its slices there", client.hex()[:8], flaw)
        self._do(self._scheduler.client_barred(client, flaw))

    def _tick(self, now: float) -> None:
        """Do the work of every TICK_MS: spawn workers, forget killed and silent clients, kill stalled workers."""
        self._worker_pool.spawn_due(now)
        self._check_segments(now)
        # A list, since _forget changes the dict.
        for client in [c for c, heard in self._last_heard.items() if now - heard > self._settings.client_silent_s]:
            log.warning(
                "client %s has been silent for %.0f s and is forgotten",
                client.hex()[:8],
                now - self._last_heard[client],
            )
            self._forget(client)
        for worker in self._scheduler.workers:  # a worker's first task is the one that it writes
            self._worker_pool.kill_if_stalled(worker.index, worker.pid, next(iter(worker.tasks), None), now)
        self._warn(self._refusals.due(now))
        self._report_standstill(now)
        self._report_excess(now)

    def _report_excess(self, now: float) -> None:
        """Log that connections are closed for lack of descriptors: the first at once, then once per EXHAUSTED_EVERY_S."""
        if self._excess and now - self._excess_logged >= EXHAUSTED_EVERY_S:
            log.warning(
                "%d connections were closed, since this process may open only %d files; raise the limit (`ulimit -n`, or "
                "LimitNOFILE= of a systemd unit, or --ulimit nofile= of a container) and restart the node, or end idle "
                "connections",
                self._excess,
                self._gate.limit,
            )
            self._excess, self._excess_logged = 0, now

    def _check_segments(self, now: float) -> None:
        """Forget the clients that were killed, and bar those whose segments have shrunk."""
        for key in list(self._segments):  # a list, since a client that is forgotten can take others with it
            segment = self._segments.get(key)
            if segment is None:
                continue
            client, _ = key
            if segment.orphaned():
                log.info("client %s has ended without a Bye and is forgotten", client.hex()[:8])
                self._forget(client)
            elif flaw := segment.flaw():
                self._bar(client, flaw)
        if now < self._sweep_until:
            sweep()  # removes the names; the memory follows when the workers have unmapped it

    def _warn(self, lines: Iterable[str]) -> None:
        for line in lines:
            log.warning("%s", line)

    def _report_standstill(self, now: float) -> None:
        """Log each standstill once, with its place."""
        scheduler = self._scheduler
        asked = scheduler.leases + scheduler.queued
        state = (  # anything that changes while the node makes progress
            self._worker_pool.trace(),
            [w.slices for w in scheduler.workers],
            scheduler.bad_samples,
            self._send_buffers.send_s,
        )
        still_s = self._watchdog.look(now, state, asked)
        if still_s is not None:
            found = culprit([self._worker_status(w) for w in scheduler.workers])
            log.warning(
                "no progress for %.0f s although %d slices are requested: %s",
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
                case Detach(client, segment):
                    self._segments.pop((client, segment)).close()
                    self._worker_pool.release(segment)

    def _grant(self, worker: int, lease: int, task: Task) -> None:
        request = task.request
        if task.slot is None:
            assert task.segment is not None  # the scheduler gives a slot to every other task
            assert request.place is not None
            name, to = task.segment.name, task.segment.destination(request.place)
        else:
            own = self._send_buffers.destination(task)
            if own is None:  # a worker that had this slot is dead, and its locks with it
                raise NodeFailed(f"send slot {task.slot} is locked, although no worker uses it")
            name, to = self._send_buffers.segment_name, own
        self._worker_pool.give(worker, Lease(lease, request.split, task.what, request.dtype, name, to))

    def _deliver(self, task: Task) -> None:
        if task.slot is None:
            self._send(task.client.id, messages.Filled(task.request.id))
            return
        # If a send fails, the generator is dropped, and with it the hold on the slot: the slot is freed by itself.
        for frames in self._send_buffers.messages(task):
            if not self._post(messages.lane_id(task.client.id, task.request.lane), frames):
                return

    def _send(self, client: bytes, message: messages.FromNode) -> None:
        self._post(client, [messages.encode(message)])

    def _post(self, client: bytes, frames: list[Any]) -> bool:
        """Send frames to a client or one of its lanes. If it is gone, forget the client and return False."""
        owner = client[: messages.CLIENT_ID_BYTES]  # a lost lane loses its client: no one knows what it carried
        # libzmq drops what it queued for a lost client, so its slices are lost; the client will request them again.
        return sockets.try_send(self._router, [client, *frames], on_gone=lambda: self._forget(owner))

    def _forget(self, client: bytes) -> None:
        """Remove a client that is lost. It was probably killed, and its segment is an orphan then."""
        self._sweep_until = time.monotonic() + SWEEP_FOR_S
        self._remove(client)

    def _remove(self, client: bytes) -> None:
        self._last_heard.pop(client, None)
        # May grant leases to others; a nested _do is harmless, since each has its own list.
        self._do(self._scheduler.client_left(client))

    # Status

    def status(self) -> messages.Status:
        """Return the status of the node."""
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
            max_clients=MAX_CLIENTS,
        )

    def _worker_status(self, worker: WorkerRecord) -> messages.WorkerStatus:
        record, stage = self._worker_pool.progress(worker.index)
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
    """Run a node until SIGTERM or SIGINT. The calling process must have one thread, since it forks.

    Args:
        data: directory of train.lmdb and val.lmdb; one of them may be missing.
        workers: number of worker processes.
        bind: address to listen at.
        version: version of the package, for the status.
        on_ready: called with the dispatcher and the facts of its splits when the first worker is ready.
        keys: directory of the node's keys; without it, ``bind`` decides, see :mod:`loader_service.wire.access`.
        insecure: serve without keys everybody who can reach ``bind``.
        io_threads: I/O threads of libzmq, which send slices to other machines.
        hook: called with the node's metrics twice a second, after the fork server exists, so that it may start threads.

    Raises:
        LoaderServiceError: the node cannot start or cannot continue; the sentence says why.
    """
    raise_limit()  # before processes are forked, which inherit it
    chosen = keys_to_serve(bind, keys, insecure=insecure)
    installation, facts = prove(), survey(data)  # before any process is forked: errors here need no clean-up
    # Anonymous shared memory, 2 int64 per worker, which the workers inherit through both forks.
    progress = np.frombuffer(mmap.mmap(-1, workers * 2 * 8), np.int64).reshape(workers, 2)
    progress[:] = NO_RECORD  # -1, which is Stage.NONE in the other column

    slots = defaults.SEND_SLOTS_PER_WORKER * workers + 1
    # Without a name, since only the processes of this node use it: it needs no room in /dev/shm and leaves nothing there.
    own = Segment.create(slots * defaults.SEND_SLOT_BYTES, slots, named=False, reserve=False)

    # Made before the fork, so that a record is compared once for all workers.
    checked = share_checked(facts)

    def worker_main(index: int, link: socket.socket) -> None:
        Worker(link, data, facts, checked, own, progress[index]).run()

    fork_server = ForkServer(worker_main)  # before the dispatcher, whose context starts threads
    try:
        settings = Settings(
            bind,
            workers,
            send_slots=slots,
            keys=chosen,
            io_threads=io_threads,
            checked_bytes=sum(each.max_bytes for each in checked.values()),
        )
        dispatcher = Dispatcher(settings, facts, installation, fork_server, own, progress, version)
    except BaseException:
        fork_server.close()
        raise
    dispatcher.run(lambda ready: on_ready(ready, facts), hook)
