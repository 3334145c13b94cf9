"""The shell around the protocol core: a thread with sockets and a clock, which works while the caller's thread trains.

:class:`~loader_service.client.protocol.ClientProtocol` decides; this file carries its actions out. The thread sleeps in
poll and wakes for messages, for commands of the caller's thread and for the clock. It touches pixels only to copy frames
into their slot. The caller's thread sends commands through a deque; :mod:`loader_service.client.delivery` has the ways of
finished batches to it and of slots back.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zmq

from loader_service import defaults
from loader_service.client.buffers import Buffers
from loader_service.client.connection import Connection, Lane
from loader_service.client.delivery import Bell, Deliveries, Holds
from loader_service.client.protocol import (
    Action,
    Ask,
    ClientProtocol,
    Connect,
    CopyPixels,
    CopyTail,
    Deliver,
    Disconnect,
    Inform,
    OpenLanes,
    Quarantined,
    Ready,
    Run,
    Send,
    Standstill,
    Warn,
)
from loader_service.client.resolver import Resolver
from loader_service.errors import (
    LinkError,
    LoaderClosed,
    LoaderServiceError,
    MessageError,
    NodeFailed,
    NoNodeError,
    printable,
)
from loader_service.types import DatasetFacts, EpochAccount, Split
from loader_service.wire import messages, sockets
from loader_service.wire.access import Access
from loader_service.wire.sockets import Waker

log = logging.getLogger("loader_service.client")

TICK_MS: Final = 250
"""Interval of the protocol's clock: short against PING_AFTER_S, long against the cost of a wake-up."""


class Session:
    """One client's thread, connections and slots.

    The thread makes whatever must be freed again, and frees it at its end. No signal's handler runs there, so an exception in
    the caller's thread leaves nothing behind, wherever it is raised: the caller only has to close the session, once more if
    that was interrupted.

    Args:
        addresses: addresses of the nodes; a name stands for all addresses behind it.
        split: the split that the nodes must serve.
        max_bad: most bad records that may be replaced; None ends the run at the first.
        access: the keys for each address.
        connections: connections with each node that cannot write into this client's slots.

    Fields:
        addresses: as given.
        pid: the process that opened it.
        holds: the slots whose arrays the caller has.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        split: Split,
        max_bad: int | None,
        access: Access,
        connections: int = defaults.CONNECTIONS,
    ) -> None:
        self.addresses, self._split, self._access = addresses, split, access
        name = f"{socket.gethostname()}:{os.getpid()}"[:255]  # the wire's limit
        self._core = ClientProtocol(name, addresses, split, max_bad=max_bad, connections=connections)
        self._ready = threading.Event()  # the core knows the dataset's facts, or an error has come first
        self._allocated = threading.Event()  # the slots are made, or cannot be
        self._error: LoaderServiceError | None = None
        self._buffers: Buffers | None = None
        self._deliveries = self._newest = Deliveries()  # of the run in progress; of the run that was begun last
        self.holds = Holds()
        self._commands: deque[Callable[[], None]] = deque()  # appending to it and popping from it are atomic
        self._owed = 0  # slices that were owed when the thread last went to sleep
        self._stopping = self._over = False
        self._next_tick = time.monotonic()
        self._io_threads = connections  # one connection keeps one busy
        self._connections: dict[str, Connection] = {}
        self._poller = zmq.Poller()
        self._waker: Waker | None = None  # until the thread listens
        self.pid = os.getpid()
        self._resolver = Resolver(
            addresses, lambda found: self._command(lambda: self._carry_out(self._core.resolved(found)))
        )
        # Daemon: a loader that is never closed must not block the exit.
        self._thread = threading.Thread(target=self._work, name="loader-service", daemon=True)
        # False if a close() came before the thread ran. The first entry stands.
        self._runner: dict[str, bool] = {}
        self._closing = Bell()

    # Called by the caller's thread

    def start(self) -> None:
        """Start the threads. Only a session that the caller can close by then is started."""
        self._thread.start()
        self._resolver.start()

    def wait_for_facts(self, timeout_s: float | None) -> DatasetFacts:
        """Wait until a node has been welcomed, and return the facts of the split that it serves.

        Raises:
            NoNodeError: none answered in time.
            NodeRefused: one answered, but it serves something else.
        """
        if not self._ready.wait(timeout_s):
            raise NoNodeError(self.addresses, timeout_s or 0.0)
        if self._error:
            raise self._error
        # Written before the event was set, so this thread sees it.
        assert self._core.facts is not None
        return self._core.facts

    def allocate(self, make: Callable[[], Buffers]) -> Buffers:
        """Have the thread make the slots, and return them.

        Raises:
            Exception: whatever ``make`` raises.
        """
        refusals: list[Exception] = []
        done = self._allocated = threading.Event()

        def command() -> None:
            try:
                self._buffers = make()
            except Exception as error:
                refusals.append(error)
            done.set()

        self._command(command)
        if not self._over:  # else the thread has ended
            done.wait()
        if self._buffers is None:
            raise refusals[0] if refusals else self._error or LoaderClosed()
        return self._buffers

    def begin(self, run: Run) -> Deliveries:
        """Begin a run, in place of the one in progress; return the queue that its batches come from."""
        deliveries = self._newest = Deliveries()

        # Runs in the session's thread, like every command: the core has no lock.
        def command() -> None:
            self._take_back_undelivered()
            self._deliveries = deliveries
            self._carry_out(self._core.begin(run))

        self._command(command)
        if self._over:  # the thread has ended, so nothing would ever come
            deliveries.end(self._error or LoaderClosed())
        return deliveries

    def take_back_slots(self) -> None:
        """Have slots taken back whose arrays are gone."""
        # None is missed: this looks for slots, then reads _owed; the thread writes _owed, then looks for slots.
        # While slices are owed, the next answer wakes the thread within a slice's time: save the system call.
        if self.holds.changed and not self._owed:
            self._wake()

    def close(self) -> None:
        """Leave the nodes, end the thread and free the slots; again, if an earlier call was interrupted."""
        if self.pid != os.getpid():  # a forked copy has no thread, and its sockets and slots are the parent's
            return
        self._stopping = True
        self._resolver.close()
        self._closing.ring()
        self._wake()
        if self._thread.ident == threading.get_ident():
            return  # a finaliser, since the last reference to the loader was dropped here: the thread ends soon
        if self._runner.setdefault("is the thread", False):
            self._thread.join()
        else:  # it has not begun, and finds the entry if it ever does
            self._end()

    def check_open(self) -> None:
        """Raise LoaderClosed from the call of :meth:`close` on."""
        if self._stopping:
            raise LoaderClosed

    @property
    def slot_bytes(self) -> int:
        """The first node's send slot, in bytes; a slice must fit in it."""
        return self._core.slot_bytes

    @property
    def workers(self) -> int:
        """The first node's number of worker processes."""
        return self._core.workers

    @property
    def accounts(self) -> list[EpochAccount]:
        """The account of each epoch of the run in progress; the caller counts ``delivered``."""
        return self._core.accounts

    @property
    def excluded(self) -> tuple[int, ...] | None:
        """The records that the run in progress excludes, ascending; None without a run."""
        return self._core.excluded

    @property
    def pending(self) -> int:
        """Number of batches in the making."""
        return self._core.pending

    @property
    def quarantine(self) -> list[Quarantined]:
        """The bad records found so far."""
        return list(self._core.quarantine)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        waker = self._waker
        if waker is not None:  # else the thread looks for commands before it first sleeps, or has ended
            waker.wake()

    # The thread

    def _work(self) -> None:
        if not self._runner.setdefault("is the thread", True):
            return
        waker = self._waker = Waker()
        self._context: zmq.Context[Any] = zmq.Context(io_threads=self._io_threads)
        self._poller.register(waker.fileno(), zmq.POLLIN)
        try:
            while not self._stopping:
                # Slots come back without waking.
                idle = not self._commands and not self.holds.changed
                ready = dict(self._poller.poll(TICK_MS if idle else 0))
                if waker.fileno() in ready:
                    waker.clear()
                self._hear(ready)
                for slot in self.holds.take_back():
                    self._core.slot_returned(slot)
                while self._commands:
                    self._commands.popleft()()
                now = time.monotonic()
                if now >= self._next_tick:
                    self._carry_out(self._core.tick(now))
                    self._next_tick = now + TICK_MS / 1000
                self._carry_out(self._core.advance(now))
                self._owed = self._core.owed
        except LoaderServiceError as error:
            self._fail(error)
        except Exception as error:  # a bug of ours; without this the caller would wait for ever
            log.exception("the client's loop broke")
            self._fail(NodeFailed(f"the client's loop broke: {error!r}"))
        finally:
            self._end()
            for connection in self._connections.values():
                connection.close()
            self._context.term()  # waits for the Byes, at most BYE_LINGER_MS
            self._closing.wait()  # after an error the caller still has batches to take
            if self._buffers is not None:
                self._buffers.close()
            self._waker = None

    def _fail(self, error: LoaderServiceError) -> None:
        """Pass an error to the caller's thread, wherever it waits."""
        self._error = error
        self._core.end()
        self._ready.set()  # last: wait_for_facts reads _error after the event

    def _end(self) -> None:
        """End the deliveries, wherever the caller waits for them."""
        self._over = True  # first: a begin or an allocation after this ends by itself
        self._newest.end(self._error or LoaderClosed())
        self._allocated.set()

    def _take_back_undelivered(self) -> None:
        """Return the slots of batches that the caller has not taken from the last run's queue."""
        # No race: the caller keeps no claim to a batch of the last run after it has called begin. The first batch may be one
        # that it took; then its slot is the caller's, or has come back already and coming back again changes nothing.
        for batch in self._deliveries:
            if batch.slot not in self.holds:
                self._core.slot_returned(batch.slot)

    # Events

    def _hear(self, ready: dict[Any, int]) -> None:
        """Pass on everything that has arrived on the sockets that poll reported."""
        for connection in list(self._connections.values()):  # copies: actions open and close connections and lanes
            for lane in list(connection.lanes):
                # An action may close the connection at any point, and its sockets must not be read after that.
                if not connection.closed and lane.monitor.socket in ready:
                    self._hear_monitor(connection, lane)
                if not connection.closed and lane.socket in ready:
                    self._hear_node(connection, lane)

    def _hear_monitor(self, connection: Connection, lane: Lane) -> None:
        node = connection.address
        try:
            for connected in lane.monitor.events():
                event = self._core.connected if connected else self._core.disconnected
                self._carry_out(event(node, time.monotonic(), lane.number))
        except LinkError as error:  # what listens there is no node, or one that refuses this client's key
            self._carry_out(self._core.refuse(node, error, time.monotonic()))

    def _hear_node(self, connection: Connection, lane: Lane) -> None:
        node = connection.address
        while not connection.closed and (frames := lane.receive()):  # ends, since credits bound what a node sends
            head, payload = frames[0], frames[1:]
            try:
                message = messages.decode_from_node(head.buffer)
            except MessageError as error:
                self._carry_out(self._core.malformed(node, error, time.monotonic(), messages.protocol_of(head.buffer)))
                return
            sizes = [len(frame) for frame in payload]
            self._carry_out(self._core.receive(node, message, time.monotonic(), lane.number, sizes), payload)

    # Actions

    def _carry_out(self, actions: Iterable[Action], payload: Sequence[zmq.Frame] = ()) -> None:
        """Carry out the core's actions in their order.

        Args:
            actions: the actions.
            payload: the frames that came with the message that caused them.
        """
        for action in actions:
            match action:
                case Ask():
                    self._ask(action)
                case Deliver(batch):
                    self._deliveries.put(batch)
                case CopyPixels(batch, part, start):
                    self._slots.write_pixels(batch, part, start, _bytes_of(payload[0]))
                case CopyTail(batch, part):
                    self._slots.write_tail(batch, part, _bytes_of(payload[0]))
                case Send(node, message, lane):
                    if connection := self._connections.get(node):
                        connection.send(message, lane)  # if it is dropped, the core sends Hello or Ping again
                case Connect(node):
                    self._connect(node)
                case Disconnect(node):
                    self._disconnect(node)
                case OpenLanes(node, connections):
                    self._open_lanes(node, connections)
                case Ready():
                    self._ready.set()
                case Inform(text):
                    log.info("%s", printable(text))
                case Warn(text):
                    log.warning("%s", printable(text))
                case Standstill():
                    log.warning("%s", printable(str(action)))

    @property
    def _slots(self) -> Buffers:
        assert self._buffers is not None, "only a run asks for slices"
        return self._buffers

    def _ask(self, ask: Ask) -> None:
        connection = self._connections.get(ask.node)
        if connection is None:  # lost by an earlier one of these requests: the part is wanted again already
            return
        slots = self._slots
        request = messages.Request(
            ask.instance,
            ask.number,
            self._split,
            slots.slice_id(ask.batch.plan.epoch, ask.part),
            slots.layout.dtype,
            slots.place(ask) if ask.shared else None,
            ask.lane,
        )
        if not connection.send(request):  # EAGAIN: IMMEDIATE queues nothing without a connection
            self._carry_out(self._core.disconnected(ask.node, time.monotonic()))

    def _connect(self, node: str) -> None:
        # The identity is unguessable, so that no other client can receive this one's slices.
        identity = secrets.token_bytes(messages.CLIENT_ID_BYTES)
        connection = Connection(self._context, node, identity, self._access.keys_for(node))
        self._connections[node] = connection
        self._watch(connection.lanes)

    def _open_lanes(self, node: str, connections: int) -> None:
        sockets.keep_freed_frames()  # else malloc returns each frame's memory to the kernel and faults it in again
        self._watch(self._connections[node].open_lanes(connections))

    def _watch(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            self._poller.register(lane.socket, zmq.POLLIN)
            self._poller.register(lane.monitor.socket, zmq.POLLIN)

    def _disconnect(self, node: str) -> None:
        connection = self._connections.pop(node)
        for lane in connection.lanes:
            self._poller.unregister(lane.socket)
            self._poller.unregister(lane.monitor.socket)
        connection.close()


def _bytes_of(frame: zmq.Frame) -> npt.NDArray[np.uint8]:
    """Return a frame's bytes as an array (n,) uint8, without copying."""
    return np.frombuffer(frame.buffer, np.uint8)  # keeps the frame, and so libzmq's memory, alive
