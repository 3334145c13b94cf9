"""The sockets that lead to one node."""

from __future__ import annotations

from typing import Any, Final

import zmq

from loader_service.wire import messages, sockets
from loader_service.wire.auth import ClientKeys

_READABLE: Final = int(zmq.POLLIN)  # a plain int: & of an IntFlag makes a new object


class Lane:
    """One socket to a node and the monitor of its state.

    Lane 0 carries the conversation. Further lanes exist only for slices in frames, since one TCP connection keeps one core
    busy on either side.
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, identity: bytes, number: int, keys: ClientKeys | None
    ) -> None:
        self.number = number
        name = messages.lane_id(identity, number)
        self.socket, self.monitor = sockets.connect_client(context, address, name, keys, judges=number == 0)

    def send(self, message: messages.FromClient) -> bool:
        """Send without waiting; False if there is no connection."""
        return sockets.try_send(self.socket, [messages.encode(message)])

    def receive(self) -> list[zmq.Frame] | None:
        """Return the next message's frames, without copying them; None if there is none."""
        # Asking for the events first costs a third of the exception that recv raises on an empty socket.
        if not int(self.socket.get(zmq.EVENTS)) & _READABLE:
            return None
        frames = [self.socket.recv(zmq.DONTWAIT, copy=False)]
        while frames[-1].more:  # libzmq hands out whole messages, so the rest is there, too
            frames.append(self.socket.recv(zmq.DONTWAIT, copy=False))
        return frames

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what has not left after ``linger_ms`` is dropped."""
        self.monitor.close()  # before the socket that it watches
        self.socket.close(linger=linger_ms)


class Connection:
    """All lanes to one node.

    Args:
        context: the client's.
        address: the node's address.
        identity: CLIENT_ID_BYTES random bytes, by which the node knows this client.
        keys: the client's, for a node that has keys.
    """

    def __init__(self, context: zmq.Context[Any], address: str, identity: bytes, keys: ClientKeys | None) -> None:
        self.address = address
        self.closed = False
        self._context, self._identity, self._keys = context, identity, keys
        self.lanes: list[Lane] = []
        self.open_lanes(1)

    def send(self, message: messages.FromClient, lane: int = 0) -> bool:
        """Send by a lane without waiting; False if there is no connection."""
        return self.lanes[lane].send(message)

    def open_lanes(self, count: int) -> list[Lane]:
        """Open lanes until there are ``count``; return the new ones, which connect in the background."""
        numbers = range(len(self.lanes), count)
        new = [Lane(self._context, self.address, self._identity, number, self._keys) for number in numbers]
        self.lanes += new
        return new

    def close(self) -> None:
        """Say goodbye and close all lanes."""
        self.closed = True  # first: the session checks it before each read
        self.send(messages.Bye())
        for lane in self.lanes:
            lane.close(0 if lane.number else sockets.BYE_LINGER_MS)  # only lane 0 has a Bye to send
