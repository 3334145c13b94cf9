"""One node as its client sees it: the connections, and how far the acquaintance goes."""

from __future__ import annotations

from itertools import count
from typing import Any, Final

import zmq

from loader_service import defaults
from loader_service.wire import messages, sockets
from loader_service.wire.auth import ClientKeys

GREET_AGAIN_S: Final = 2.0
"""After so long without an answer a Hello is sent again."""

_READABLE: Final = int(zmq.POLLIN)


class Link:
    """One connection to a node: the one that everything is said by, or a lane, by which slices come.

    A lane is ``open`` once the node has answered by it, so that it knows where the lane's slices go.
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, identity: bytes, lane: int, keys: ClientKeys | None
    ) -> None:
        self.lane, self.open = lane, False
        name = messages.lane_id(identity, lane)
        self.socket, self.monitor = sockets.connect_client(context, address, name, keys)

    def send(self, message: messages.FromClient) -> bool:
        """Send without waiting; False if there is no connection."""
        return sockets.try_send(self.socket, [messages.encode(message)])

    def receive(self) -> list[zmq.Frame] | None:
        """The next message's frames, without copying; None if there is none."""
        if not int(self.socket.get(zmq.EVENTS)) & _READABLE:  # costs a third of being told so by an exception
            return None
        frames = [self.socket.recv(zmq.DONTWAIT, copy=False)]
        while frames[-1].more:
            frames.append(self.socket.recv(zmq.DONTWAIT, copy=False))
        return frames

    def close(self, linger_ms: int = 0) -> None:
        """Let go of the connection."""
        self.monitor.close()
        self.socket.close(linger=linger_ms)


class Peer:
    """One node.

    ``state`` is ``connecting`` (nothing known), ``welcomed`` (it serves what is needed) or ``working`` (it can be
    asked, through shared memory if ``shared``).
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, identity: bytes, name: str, keys: ClientKeys | None
    ) -> None:
        self.address, self._name = address, name
        self.state = "connecting"
        self.shared = False
        self.listed = True  # whether the name that led here still does
        self.instance = ""
        self.workers = 0
        self.heard_at = 0.0
        self._greeted_at = 0.0
        self._pinged_at = 0.0
        self._turns = count()
        self._how = (context, address, identity)
        self._keys = keys
        self._link = Link(*self._how, 0, keys)
        self.links = [self._link]

    def send(self, message: messages.FromClient) -> bool:
        """Send without waiting; False if there is no connection."""
        return self._link.send(message)

    def open_lanes(self, connections: int) -> list[Link]:
        """Begin to connect so often in all; returns the links that are new."""
        new = [Link(*self._how, lane, self._keys) for lane in range(len(self.links), connections)]
        self.links += new
        return new

    def next_lane(self) -> int:
        """By which link the next slice is to come: by each in turn, of those that are open."""
        lanes = [0, *(link.lane for link in self.links if link.open)]
        return lanes[next(self._turns) % len(lanes)]

    def greet(self, now: float) -> None:
        """Introduce this client."""
        self._greeted_at = self.heard_at = now
        self.send(messages.Hello(messages.PROTOCOL, self._name))

    def welcomed(self, welcome: messages.Welcome) -> None:
        """The node has answered."""
        self.state, self.instance, self.workers = "welcomed", welcome.instance, welcome.workers

    def tick(self, now: float) -> bool:
        """Keep the acquaintance alive; True if the node has been silent for too long."""
        if self.state == "connecting":
            if now - self._greeted_at > GREET_AGAIN_S:
                self.greet(now)
            return False
        silent = now - self.heard_at
        if silent > defaults.NODE_SILENT_S:
            return True
        if silent > defaults.PING_AFTER_S and now - self._pinged_at > defaults.PING_AFTER_S:
            self._pinged_at = now
            self.send(messages.Ping())
        return False

    def close(self) -> None:
        """Say goodbye and let go of the connections."""
        self.send(messages.Bye())
        for link in self.links:
            link.close(0 if link.lane else sockets.BYE_LINGER_MS)
