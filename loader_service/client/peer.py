"""One node as its client sees it: the connection, and how far the acquaintance goes."""

from __future__ import annotations

from typing import Any, Final

import zmq

from loader_service import defaults
from loader_service.link import messages, sockets
from loader_service.link.keys import ClientKeys

GREET_AGAIN_S: Final = 2.0
"""After so long without an answer a Hello is sent again."""

_READABLE: Final = int(zmq.POLLIN)


class Peer:
    """One connection.

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
        self.socket, self.monitor = sockets.connect_client(context, address, identity, keys)

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
        """Say goodbye and let go of the connection."""
        self.send(messages.Bye())
        self.monitor.close()
        self.socket.close(linger=sockets.BYE_LINGER_MS)
