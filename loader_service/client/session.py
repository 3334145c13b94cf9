"""The loop around the ledger: a thread that talks to the nodes while the caller's thread trains.

It sleeps in poll and wakes for messages, for slots that came back and for the clock; it never touches pixels except to
copy frames from other machines into their slot. The caller's thread takes finished batches from a queue.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import zmq

from loader_service import defaults
from loader_service.client.actions import Ask, Deliver, Finish, Standstill
from loader_service.client.buffers import Buffers
from loader_service.client.connection import Link, Peer
from loader_service.client.handshake import check_protocol, check_welcome
from loader_service.client.ledger import MAX_EXCUSES, Ledger
from loader_service.client.quarantine import Quarantine
from loader_service.client.resolver import Resolver
from loader_service.errors import (
    LoaderServiceError,
    MessageError,
    NodeFailed,
    NodeRefused,
    NoNodeError,
    RecordError,
    SharedMemoryError,
)
from loader_service.types import DatasetFacts, Split
from loader_service.wire import messages, sockets
from loader_service.wire.auth import ClientKeys
from loader_service.wire.waker import Waker

log = logging.getLogger("loader_service.client")

TICK_MS: Final = 250
FIRST_COMPLAINT_S: Final = 2.0
"""How long no node may be there before the client says that it waits; then at twice the interval each time."""

Delivery = Deliver | Finish | LoaderServiceError
NewLedger = Callable[[list[int], Iterator[int]], Ledger]
"""Makes a run's ledger from the slots that are free and the numbers for its asks."""


class Session:
    """One client's connections, and the run in progress.

    Args:
        addresses: of the nodes.
        split: what they must serve.
        max_bad: how many bad records may be replaced; None stops at the first.
        keys: for nodes that demand them.
        connections: with each node that cannot write into this client's slots.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        split: Split,
        max_bad: int | None = None,
        keys: ClientKeys | None = None,
        connections: int = defaults.CONNECTIONS,
    ) -> None:
        self.addresses, self.split, self._keys = addresses, split, keys
        self.quarantine = Quarantine(max_bad)
        self.facts: DatasetFacts | None = None
        self.slot_bytes = 0  # of the first node
        self.workers = 1  # likewise
        self._welcomed = threading.Event()
        self._error: LoaderServiceError | None = None
        self._waker = Waker()
        self._commands: deque[Callable[[], None]] = deque()
        self._numbers = itertools.count(1)
        self._ledger: Ledger | None = None
        self._buffers: Buffers | None = None
        self._due = 0  # answers, when the thread last went to sleep
        self._out: set[int] = set()  # slots of batches on their way to the caller or in the caller's hands
        self._transport = "auto"
        self._deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._stopping = False
        self._alone_since = self._next_tick = time.monotonic()
        self._complain_after_s = FIRST_COMPLAINT_S
        self._connections = connections
        self._context: zmq.Context[Any] = zmq.Context(io_threads=connections)
        self._peers: list[Peer] = []
        self._poller = zmq.Poller()
        for address in addresses:
            sockets.check_address(address)
        self._pid = os.getpid()
        self._resolver = Resolver(addresses, lambda found: self._command(lambda: self._reconcile(found)))
        self._thread = threading.Thread(target=self._run, name="loader-service", daemon=True)
        self._thread.start()

    # Called by the caller's thread

    def wait_for_facts(self, timeout_s: float | None) -> DatasetFacts:
        """What the first node serves.

        Raises:
            NoNodeError: none answered in time.
            NodeRefused: one answered, but it serves something else.
        """
        if not self._welcomed.wait(timeout_s):
            raise NoNodeError(self.addresses, timeout_s or 0.0)
        if self._error:
            raise self._error
        assert self.facts is not None
        return self.facts

    def begin(self, buffers: Buffers, transport: str, new_ledger: NewLedger) -> queue.SimpleQueue[Delivery]:
        """Start a run, or start anew, with slots in ``buffers``; returns the queue that its batches will come from."""
        deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

        def command() -> None:
            self._forget_undelivered()
            self._deliveries, self._transport = deliveries, transport
            free = [slot for slot in range(buffers.slots) if slot not in self._out]
            self._buffers, self._ledger = buffers, new_ledger(free, self._numbers)
            for peer in self._peers:
                self._employ(peer)

        self._command(command)
        if self._error:
            deliveries.put(self._error)
        return deliveries

    def slot_returned(self, slot: int) -> None:
        """A slot's arrays are gone. Safe to call from anywhere, at any time.

        While answers are due the thread is not woken for it: the next one will, within a slice's time.
        """
        self._commands.append(lambda: self._take_back(slot))
        if not self._due:
            self._waker.wake()

    def close(self) -> None:
        """Say goodbye and end the thread."""
        if self._pid != os.getpid():  # a fork's copy: the thread is not here
            return
        self._stopping = True
        self._resolver.close()
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    @property
    def ledger(self) -> Ledger | None:
        """The run's ledger; only its accounts may be read from outside."""
        return self._ledger

    def _take_back(self, slot: int) -> None:
        self._out.discard(slot)
        if self._ledger:
            self._ledger.slot_returned(slot)

    def _forget_undelivered(self) -> None:
        """A run ends before its time: batches that nobody took give their slots back."""
        while not self._deliveries.empty():
            delivery = self._deliveries.get_nowait()
            if isinstance(delivery, Deliver):
                self._out.discard(delivery.batch.slot)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._waker.wake()

    # The thread

    def _run(self) -> None:
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        try:
            while not self._stopping:
                self._hear(dict(self._poller.poll(0 if self._commands else TICK_MS)))
                while self._commands:
                    self._commands.popleft()()
                if (now := time.monotonic()) >= self._next_tick:
                    self._tick(now)
                    self._next_tick = now + TICK_MS / 1000
                self._advance()
        except LoaderServiceError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the client's loop broke")
            self._fail(NodeFailed(f"the client's loop broke: {error!r}"))
        finally:
            for peer in self._peers:
                peer.close()
            self._context.term()

    def _fail(self, error: LoaderServiceError) -> None:
        self._error = error
        while self._commands:  # a run that was begun just now has a queue that waits for this
            self._commands.popleft()()
        self._ledger = None
        self._deliveries.put(error)
        self._welcomed.set()

    def _reconcile(self, found: frozenset[str]) -> None:
        """Connect to nodes that are new behind a name; leave those that are gone from it, once they do not work."""
        for peer in list(self._peers):
            peer.listed = peer.address in found
            self._drop_if_unlisted(peer)
        for address in sorted(found - {peer.address for peer in self._peers}):
            name = f"{socket.gethostname()}:{os.getpid()}"[:255]
            peer = Peer(self._context, address, secrets.token_bytes(16), name, self._keys)
            self._peers.append(peer)
            self._watch(peer.links)

    def _watch(self, links: list[Link]) -> None:
        for link in links:
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor.socket, zmq.POLLIN)

    def _drop_if_unlisted(self, peer: Peer) -> None:
        if peer.listed or peer.state == "working":
            return
        self._peers.remove(peer)
        for link in peer.links:
            self._poller.unregister(link.socket)
            self._poller.unregister(link.monitor.socket)
        peer.close()

    def _hear(self, ready: dict[Any, int]) -> None:
        """Take in all that has come, from who the poller says has sent something."""
        if self._waker.fileno() in ready:
            self._waker.clear()
        for peer in list(self._peers):
            for link in list(peer.links):
                if peer in self._peers and link.monitor.socket in ready:
                    self._hear_monitor(peer, link)
                if peer in self._peers and link.socket in ready:
                    self._hear_node(peer, link)

    def _hear_monitor(self, peer: Peer, link: Link) -> None:
        for connected in link.monitor.events():
            if link.lane and connected:
                link.send(messages.Ping())
            elif link.lane:
                self._lose_lane(peer, link)
            elif connected:
                peer.greet(time.monotonic())
            else:
                self._lose(peer, "its connection was cut")

    def _lose_lane(self, peer: Peer, link: Link) -> None:
        """Slices may have been on their way by it, and nobody knows which: begin anew with the node."""
        was_open, link.open = link.open, False
        if was_open and peer.state == "working":
            self._begin_anew(peer, "one of its connections was cut")

    def _hear_node(self, peer: Peer, link: Link) -> None:
        while peer in self._peers and (frames := link.receive()):
            peer.heard_at = time.monotonic()
            link.open = link.lane > 0
            try:
                self._take(peer, messages.decode_from_node(frames[0].buffer), frames[1:])
            except MessageError as error:
                check_protocol(peer.address, messages.protocol_of(frames[0].buffer))
                log.warning("node %s: %s", peer.address, error)
                self._lose(peer, "it does not speak this protocol")
                return

    def _take(self, peer: Peer, message: messages.FromNode, frames: list[zmq.Frame]) -> None:
        match message:
            case messages.Welcome():
                self._welcome(peer, message)
            case messages.Attached():
                self._attached(peer, message)
            case messages.Pixels():
                self._pixels(peer, message, frames)
            case messages.Filled():
                self._filled(peer, message.id, frames)
            case messages.Failed():
                self._failed(peer, message)
            case messages.UnknownClient():
                self._begin_anew(peer, "it was restarted")
            case messages.Ping():
                peer.send(messages.Pong())

    def _welcome(self, peer: Peer, welcome: messages.Welcome) -> None:
        facts = check_welcome(peer.address, welcome, self.split, self.facts)
        if self.facts is None:
            self.slot_bytes, self.workers = welcome.slot_bytes, welcome.workers
        elif welcome.slot_bytes < self.slot_bytes:
            raise NodeRefused(peer.address, "send slot", f"{self.slot_bytes} bytes", f"{welcome.slot_bytes} bytes")
        if self._ledger:  # it may be known already, from before a reconnection
            self._ledger.node_down(peer.address)
        peer.welcomed(welcome)
        self.facts = self.facts or facts
        self._welcomed.set()
        self._employ(peer)

    def _employ(self, peer: Peer) -> None:
        """Have a node work for the run, through shared memory if it can."""
        if peer.state not in ("welcomed", "working") or self._buffers is None:
            return
        if self._transport == "tcp" or not self._buffers.segment.name:
            self._put_to_work(peer, shared=False)
        elif peer.state == "working":
            self._put_to_work(peer, shared=peer.shared)
        else:
            peer.send(messages.Attach(self._buffers.segment.name))

    def _attached(self, peer: Peer, answer: messages.Attached) -> None:
        if self._buffers is None or answer.segment != self._buffers.segment.name or peer.state != "welcomed":
            return
        shared = answer.nonce == self._buffers.segment.nonce
        if not shared and self._transport == "shm":
            reason = answer.reason or "it opened another segment of that name"
            raise SharedMemoryError(
                f"the node at {peer.address} cannot share memory with this client ({reason})",
                remedy="run both on one machine, as one user, with one /dev/shm; or let transport be auto",
            )
        if not shared:
            log.info(
                "node %s cannot share memory with this client, so slices come in frames: %s",
                peer.address,
                answer.reason,
            )
        self._put_to_work(peer, shared=shared)

    def _put_to_work(self, peer: Peer, *, shared: bool) -> None:
        peer.state, peer.shared = "working", shared
        if not shared:
            sockets.keep_freed_frames()
            self._watch(peer.open_lanes(self._connections))
        if self._ledger:
            self._ledger.node_up(peer.address, peer.workers)

    def _lose(self, peer: Peer, why: str) -> None:
        if peer.state == "working":
            log.warning("node %s is lost: %s", peer.address, why)
        peer.state = "connecting"
        if self._ledger:
            self._ledger.node_down(peer.address)
        self._drop_if_unlisted(peer)

    def _begin_anew(self, peer: Peer, why: str) -> None:
        self._lose(peer, why)
        if peer in self._peers:
            peer.greet(time.monotonic())

    def _pixels(self, peer: Peer, pixels: messages.Pixels, frames: list[zmq.Frame]) -> None:
        """A piece of a slice from another machine: frame to slot, the one copy that it takes."""
        found = self._ledger.answering(peer.address, pixels.id) if self._ledger else None
        if found is None or self._buffers is None:
            return
        if peer.shared or len(frames) != 1:
            raise MessageError(f"{len(frames)} frames came where a slice's pixels are due in one or in none")
        self._buffers.write_pixels(*found, pixels.start, np.frombuffer(frames[0].buffer, np.uint8))

    def _filled(self, peer: Peer, number: int, frames: list[zmq.Frame]) -> None:
        if self._ledger is None or self._buffers is None:
            return
        if found := self._ledger.answering(peer.address, number):
            if len(frames) != (0 if peer.shared else 1):
                raise MessageError(
                    f"a slice came with {len(frames)} frames, which is another way than it was asked for"
                )
            if frames:
                self._buffers.write_tail(*found, np.frombuffer(frames[0].buffer, np.uint8))
        self._ledger.filled(peer.address, number)

    def _failed(self, peer: Peer, failed: messages.Failed) -> None:
        found = self._ledger.answering(peer.address, failed.id) if self._ledger else None
        if self._ledger is None or found is None:
            return
        if failed.record >= 0:
            if self._ledger.bad(peer.address, failed.id):
                self._judge(peer, failed)
            return
        self._ledger.excused(peer.address, failed.id)
        if found[1].excuses > MAX_EXCUSES:
            raise NodeFailed(f"the one at {peer.address} could not make a slice {MAX_EXCUSES} times: {failed.reason}")

    def _judge(self, peer: Peer, failed: messages.Failed) -> None:
        """No node can read a record: stop, or replace it, as the caller chose."""
        assert self._ledger is not None
        if failed.record in self._ledger.excluded:  # another part of the same batch has had it judged already
            return
        error = RecordError(f"{self.split} at {peer.address}", failed.record, failed.reason, failed.source)
        self.quarantine.take(error, known=len(self._ledger.excluded))
        self._ledger.exclude(failed.record)

    def _tick(self, now: float) -> None:
        for peer in list(self._peers):
            if peer.tick(now):
                self._lose(peer, f"it has been silent for {defaults.NODE_SILENT_S:.0f} s")
        if any(peer.state == "working" for peer in self._peers) or (self._ledger is None and self.facts):
            self._alone_since, self._complain_after_s = now, FIRST_COMPLAINT_S
        elif now - self._alone_since >= self._complain_after_s:
            log.warning("waiting for a node at %s (%.0f s so far)", ", ".join(self.addresses), now - self._alone_since)
            self._complain_after_s *= 2

    def _advance(self) -> None:
        if self._ledger is None:
            return
        for action in self._ledger.advance(time.monotonic()):
            match action:
                case Ask():
                    self._ask(action)
                case Deliver(batch):
                    self._out.add(batch.slot)
                    self._deliveries.put(action)
                case Finish():
                    self._deliveries.put(action)
                case Standstill():
                    log.warning("%s", action)
        self._due = self._ledger.waiting

    def _ask(self, ask: Ask) -> None:
        assert self._buffers is not None
        assert self._ledger is not None
        peer = next(p for p in self._peers if p.address == ask.node)
        place = self._buffers.place(ask) if peer.shared else None
        what = self._buffers.slice_id(ask.batch.plan.epoch, ask.part)
        lane = 0 if peer.shared else peer.next_lane()
        request = messages.Request(peer.instance, ask.number, self.split, what, self._buffers.layout.dtype, place, lane)
        if not peer.send(request):
            self._lose(peer, "its connection was cut")
