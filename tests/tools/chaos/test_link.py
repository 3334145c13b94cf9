"""A link in front of a server, and the evidence that its faults acted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random

import pytest

from tools.chaos.link import HOST, Link, Links

WAIT_S = 20.0


@pytest.fixture
def links() -> Iterator[Links]:
    with Links() as links:
        yield links


class Ends:
    """Pairs of connected sockets, with the link between them."""

    def __init__(self, stack: ExitStack, links: Links) -> None:
        self._stack = stack
        self._server = stack.enter_context(socket.create_server((HOST, 0)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
            port = probe.getsockname()[1]
        self.link: Link = links.new(self._server.getsockname()[1], "127.0.0.2", port)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new connection that has carried a byte."""
        client = self._stack.enter_context(socket.create_connection((self.link.host, self.link.port), WAIT_S))
        node = self._stack.enter_context(self._server.accept()[0])
        node.settimeout(WAIT_S)
        client.sendall(b"a")
        assert node.recv(1) == b"a"
        return client, node


@pytest.fixture
def ends(links: Links) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack, links)


def _ended(end: socket.socket) -> bool:
    end.settimeout(WAIT_S)
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_one_of_several_connections_is_cut(links: Links, ends: Ends) -> None:
    """One connection ends at both sides and the other carries bytes as before; a single one is left alone."""
    first = ends.connect()
    assert not links.do(ends.link.cut_one(Random(1).getrandbits(16)))
    second = ends.connect()
    assert links.do(ends.link.cut_one(0))
    for client, _ in (first, second):
        client.settimeout(0.2)
    cut = []
    for client, node in (first, second):
        try:
            client.sendall(b"b")
            cut.append(node.recv(1) == b"")
        except OSError:
            cut.append(True)
    assert sorted(cut) == [False, True]


def test_a_cut_says_how_many_connections_it_ended(links: Links, ends: Ends) -> None:
    """A cut with connections ends them and returns their number; without any it returns 0."""
    assert links.do(ends.link.cut()) == 0
    links.do(ends.link.listen())
    client, node = ends.connect()
    assert links.do(ends.link.cut()) == 1
    assert _ended(client)
    assert _ended(node)


def test_delayed_bytes_are_counted_and_arrive(links: Links, ends: Ends) -> None:
    """Bytes that a delay has stopped are counted once they have arrived."""
    client, node = ends.connect()
    assert ends.link.delayed_bytes == 0
    ends.link.delay_s = 0.001
    client.sendall(b"1")
    assert node.recv(1) == b"1"
    assert ends.link.delayed_bytes > 0


def test_held_bytes_are_counted_and_arrive(links: Links, ends: Ends) -> None:
    """Bytes that a hold has stopped are counted, and delivered after it."""
    client, node = ends.connect()
    links.do(ends.link.hold())
    client.sendall(b"1")
    node.settimeout(0.2)
    with pytest.raises(TimeoutError):
        node.recv(1)
    links.do(ends.link.release())
    node.settimeout(WAIT_S)
    assert node.recv(1) == b"1"
    assert ends.link.held_bytes == 1
