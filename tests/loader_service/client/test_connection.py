"""Tests of several connections with one node: the same batches, also when a connection is cut."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import zmq

from loader_service import Loader, defaults, status
from loader_service.client.connection import Connection
from loader_service.errors import KeyRefused, OptionError
from loader_service.wire.auth import client_keys, generate

CONNECTIONS = 3
EPOCHS = 3


def connections_with(address: str) -> list[int]:
    """Return the descriptors of this process's TCP connections to a node."""
    port = urlsplit(address).port
    return [c.fd for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


def cut(descriptor: int) -> None:
    """Cut a connection in a way that both sides notice."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def pixels(loader: Loader) -> list[bytes]:
    return [batch.images.tobytes() for batch in loader.all_epochs()]


@pytest.fixture(name="expected")
def expected_fixture(node_address: str) -> list[bytes]:
    """Return the batches that arrive by one connection."""
    with Loader(node_address, batch_size=8, seed=3, epochs=EPOCHS, transport="tcp", connections=1) as loader:
        return pixels(loader)


@pytest.mark.parametrize("with_keys", [False, True])
def test_slices_come_by_several_connections(
    start_node: Callable[..., Any],
    eventually: Callable[[Callable[[], bool], str], None],
    expected: list[bytes],
    tmp_path: Path,
    with_keys: bool,
) -> None:
    """Each connection carries slices, the node sees one client, and the batches equal those of one connection."""
    options: dict[str, Any] = {}
    if with_keys:
        generate(tmp_path / "keys")
        options = {"server_key": tmp_path / "keys" / "node.key", "client_key": tmp_path / "keys" / "client.secret"}
    threads = ("--io-threads", "2", *(("--keys", str(tmp_path / "keys")) if with_keys else ()))
    node = start_node(workers=2, options=threads)
    with Loader(
        node.address, batch_size=8, seed=3, epochs=EPOCHS, transport="tcp", connections=CONNECTIONS, **options
    ) as loader:
        got = [next(loader.all_epochs()).images.tobytes()]
        eventually(lambda: len(connections_with(node.address)) == CONNECTIONS, "all connections are open")
        received = dict.fromkeys(connections_with(node.address), 0)
        got += pixels(loader)
        for descriptor in received:
            received[descriptor] = _bytes_received(descriptor)
        assert [client.transport for client in status(node.address, **options).clients] == ["tcp"]
    assert got == expected
    assert min(received.values()) > 10 * 224 * 224 * 3, received


def test_a_loopback_node_has_several_by_default(
    start_node: Callable[..., Any], eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """Slices that come in frames from a node with the user's own keys use several connections, shared memory one."""
    node = start_node(workers=1)
    for transport, connections in (("tcp", defaults.CONNECTIONS), ("shm", 1)):
        with Loader(node.address, batch_size=8, transport=transport, timeout_s=20) as loader:
            for _ in zip(range(3), loader, strict=False):
                pass
            eventually(
                lambda count=connections: len(connections_with(node.address)) == count, f"{connections} are open"
            )
    assert defaults.CONNECTIONS > 1


def test_a_connection_that_is_cut_costs_nothing(
    start_node: Callable[..., Any],
    eventually: Callable[[Callable[[], bool], str], None],
    expected: list[bytes],
) -> None:
    """The slices of any cut connection are requested again, and each position is delivered once."""
    node = start_node(workers=2)
    with Loader(node.address, batch_size=8, seed=3, epochs=EPOCHS, transport="tcp", connections=CONNECTIONS) as loader:
        got = []
        for batch in loader.all_epochs():
            got.append(batch.images.tobytes())
            if len(got) in (3, 6, 9):
                eventually(lambda: len(connections_with(node.address)) == CONNECTIONS, "all connections are open")
                cut(connections_with(node.address)[len(got) // 3 - 1])
        assert [account.delivered for account in loader.ledger] == [loader.dataset.count] * EPOCHS
    assert got == expected


def test_the_number_of_connections_is_checked(node_address: str) -> None:
    """0 connections and more than 16 are refused."""
    for connections in (0, 17):
        with pytest.raises(OptionError, match="connections"):
            Loader(node_address, connections=connections)


def _bytes_received(descriptor: int) -> int:
    """Return the bytes received by a connection so far, from the kernel (tcp_info's tcpi_bytes_received)."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(info[128:136], "little")


@pytest.fixture
def breaking(start_node: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Provide ``breaking()``: the address of a relay that ends each connection of a peer in its handshake, but lets one be greeted."""
    generate(tmp_path / "keys")
    node = start_node(options=("--keys", str(tmp_path / "keys")))
    server = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        while True:
            try:
                peer = server.accept()[0]
            except OSError:  # the test is over
                return
            with peer, socket.create_connection(("127.0.0.1", urlsplit(node.address).port)) as there:
                peer.settimeout(5)
                peer.sendall(there.recv(64))  # the node's signature, so that a ZeroMQ peer is seen to listen
                peer.recv(64)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    yield lambda: f"tcp://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)


def test_a_lane_never_judges_its_node(
    breaking: Callable[[], str], tmp_path: Path, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """Broken handshakes of a lane say nothing about the node's key; the same ones of lane 0 refuse it."""
    keys = client_keys(tmp_path / "keys" / "node.key", tmp_path / "keys" / "client.secret")
    context: zmq.Context[Any] = zmq.Context()
    connection = Connection(context, breaking(), os.urandom(16), keys)
    connection.open_lanes(2)
    losses: list[bool] = []
    refused: list[KeyRefused] = []

    def hear() -> bool:
        losses.extend(connection.lanes[1].monitor.events())
        try:
            connection.lanes[0].monitor.events()
        except KeyRefused as error:
            refused.append(error)
        return bool(refused) and len(losses) > 6

    try:
        eventually(hear, "lane 0 is refused, and lane 1 is lost again and again")
    finally:
        connection.close()
        context.term()
    assert not any(losses)
