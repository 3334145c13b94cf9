"""Floods from peers without a key: a node neither grows nor stops serving, whatever they send."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest
import zmq

from loader_service import Loader, LocalNode, status
from loader_service.wire import auth, sockets
from loader_service.wire.access import access
from loader_service.wire.messages import MAX_CLIENT_MESSAGE_BYTES

GROWTH_BYTES = 64 << 20
FLOOD_S = 0.5
CHUNK_BYTES = 1 << 16
CONNECTIONS = 200


def greeting(mechanism: bytes) -> bytes:
    """Return the greeting of ZMTP 3.0: signature, version, mechanism, not a server (ZeroMQ RFC 23)."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes = b"") -> bytes:
    """Return a command frame of ZMTP."""
    content = bytes([len(name)]) + name + body
    return struct.pack(">BQ", 6, len(content)) + content


def metadata(**values: bytes) -> bytes:
    """Return the properties of a READY command."""
    names = {name.replace("_", "-").encode(): value for name, value in values.items()}
    return b"".join(bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in names.items())


READY = command(b"READY", metadata(Socket_Type=b"DEALER", Identity=b"i" * 16))
PART = b"\x01\x01a"  # flag MORE, length 1
LARGEST_FRAME = struct.pack(">BQ", 6, MAX_CLIENT_MESSAGE_BYTES) + bytes(MAX_CLIENT_MESSAGE_BYTES - 1)  # one is missing

FORMS: dict[str, tuple[bytes, bytes]] = {
    "endless parts without a mechanism": (greeting(b"NULL") + READY, PART * (CHUNK_BYTES // 3)),
    "endless parts in the handshake": (greeting(b"CURVE"), PART * (CHUNK_BYTES // 3)),
    "garbage": (b"", Random(1).randbytes(CHUNK_BYTES)),
    "garbage after the greeting": (greeting(b"CURVE"), Random(2).randbytes(CHUNK_BYTES)),
    "NULL": (greeting(b"NULL"), b""),
    "an unknown mechanism": (greeting(b"PLAIN") + command(b"HELLO", b"\x01a\x01b"), b""),
    "the first version of ZMTP": (b"\x01\x00", PART * (CHUNK_BYTES // 3)),
    "a huge frame in the first version": (b"\xff" + struct.pack(">Q", 1 << 62) + b"\x01", bytes(CHUNK_BYTES)),
    "a huge frame": (greeting(b"CURVE") + struct.pack(">BQ", 2, 1 << 62), bytes(CHUNK_BYTES)),
    "a huge command": (greeting(b"CURVE") + struct.pack(">BQ", 6, 1 << 40), bytes(CHUNK_BYTES)),
    "commands": (greeting(b"CURVE"), command(b"READY", READY) * 500),
    "PING": (greeting(b"CURVE"), command(b"PING", b"\x00\x00" + bytes(16)) * 2000),
}
"""Bytes that a peer sends once on each connection, and bytes that it repeats until the node closes the connection."""


@pytest.fixture(scope="module")
def node(dataset_dir: Path) -> Iterator[LocalNode]:
    """A node at a loopback address with the user's own keys."""
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(node: LocalNode) -> list[bytes]:
    """The batches of an epoch without an attack."""
    return epoch(node)


@pytest.fixture(scope="module")
def hello() -> bytes:
    """The first half of a handshake by a peer that knows the node's public key but has no allowed key of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context: zmq.Context[Any] = zmq.Context()
        dealer, monitor = sockets.connect_client(
            context, f"tcp://127.0.0.1:{listener.getsockname()[1]}", b"i" * 16, stranger()
        )
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                connection.sendall(greeting(b"CURVE")[:32] + b"\x01" + bytes(31))  # as a server
                with connection.makefile("rb") as file:
                    return file.read(64 + 202)  # its greeting, and the frame of its HELLO
        finally:
            monitor.close()
            dealer.close()
            context.term()


def stranger() -> auth.ClientKeys:
    """Return the keys of a peer that knows the node's public key and is not on its list."""
    own = access(["tcp://127.0.0.1:1"]).tcp
    assert own
    return replace(own, secret=zmq.curve_keypair()[1])


def epoch(node: LocalNode, **options: Any) -> list[bytes]:
    """Return the batches that an honest client receives."""
    with Loader(node.address, batch_size=50, transport="tcp", timeout_s=30, **options) as loader:
        return [batch.images.tobytes() for batch in loader]


def connect(node: LocalNode) -> socket.socket:
    """Return a connection to the node."""
    connection = socket.create_connection(("127.0.0.1", urlsplit(node.address).port or 0), timeout=10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves nothing behind
    return connection


def peak_bytes(node: LocalNode) -> int:
    """Return the largest memory that the dispatcher had since :func:`reset_peak`."""
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{node.pid}/status").read_text())
    return int(kilobytes) * 1024


def reset_peak(node: LocalNode) -> int:
    """Forget the largest memory so far (proc(5), clear_refs); return the memory of the dispatcher now."""
    Path(f"/proc/{node.pid}/clear_refs").write_text("5")
    return peak_bytes(node)


@contextmanager
def attack(once: Callable[[], int], least: int = 1) -> Iterator[list[int]]:
    """Repeat an attack in a thread until the block ends, for FLOOD_S and ``least`` times at least; yield the results."""
    done: list[int] = []
    stop = threading.Event()

    def run() -> None:
        until = time.monotonic() + FLOOD_S
        while not stop.is_set() or time.monotonic() < until or len(done) < least:
            done.append(once())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def pour(node: LocalNode, first: bytes, then: bytes) -> int:
    """Send bytes on a new connection until the node closes it; return the number of bytes that were sent."""
    sent = 0
    until = time.monotonic() + FLOOD_S
    with connect(node) as connection:
        try:
            connection.sendall(first)
            while then and time.monotonic() < until:
                connection.sendall(then)
                sent += len(then)
            return sent + len(first)
        except OSError:  # closed by the node, or full because the node no longer reads
            return sent


@pytest.mark.parametrize("form", FORMS)
def test_a_flood_costs_no_memory_and_no_service(node: LocalNode, undisturbed: list[bytes], form: str) -> None:
    """A node grows by less than 64 MiB in a flood of each form, and an honest client receives the same batches."""
    before = reset_peak(node)
    with attack(lambda: pour(node, *FORMS[form])) as done:
        assert epoch(node) == undisturbed
    assert len(done) > 0
    assert peak_bytes(node) - before < GROWTH_BYTES


@pytest.mark.parametrize("kind", ["silent", "greeted", "most of a frame", "half of a handshake"])
def test_many_connections_cost_no_memory_and_no_service(
    node: LocalNode, undisturbed: list[bytes], hello: bytes, kind: str
) -> None:
    """Hundreds of unfinished handshakes at a time cost little memory, and the node closes each within its 2 s."""
    first = {
        "silent": b"",
        "greeted": greeting(b"CURVE"),
        "most of a frame": greeting(b"CURVE") + LARGEST_FRAME,
        "half of a handshake": hello,
    }[kind]

    def hold() -> int:
        held = []
        try:
            for _ in range(CONNECTIONS):
                held.append(connect(node))
                held[-1].sendall(first)
            # The node greets, answers a hello with its WELCOME, and then waits in vain.
            return len(b"".join(iter(lambda: held[-1].recv(1 << 16), b"")))
        except OSError:  # reset by the node, since some of `first` was not read
            return 0
        finally:
            for connection in held:
                connection.close()

    before = reset_peak(node)
    with attack(hold) as answers:
        assert epoch(node) == undisturbed
    assert peak_bytes(node) - before < GROWTH_BYTES / 4
    if kind == "half of a handshake":
        assert max(answers) > 64 + 100, "no WELCOME came, so the hello was none"


def test_an_unfinished_handshake_ends_after_two_seconds(node: LocalNode) -> None:
    """A silent connection is closed by the node, not earlier than a slow peer needs and long before libzmq's 30 s."""
    with connect(node) as connection:
        start = time.monotonic()
        while connection.recv(1 << 16):
            pass
        assert 1.5 < time.monotonic() - start < 10


def test_keys_that_are_not_allowed_do_not_flood_the_log(
    dataset_dir: Path, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    """Hundreds of refused handshakes of one key write one line at once and one with their number at the end."""
    log = tmp_path / "log"
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*", log=log) as node:
        context: zmq.Context[Any] = zmq.Context()
        keys = stranger()

        def knock() -> int:
            dealer = context.socket(zmq.DEALER)
            auth.secure_client(dealer, keys)
            monitor = dealer.get_monitor_socket(zmq.Event.HANDSHAKE_FAILED_AUTH)
            dealer.connect(node.address)
            refused = monitor.poll(10_000)
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close(linger=0)
            return refused

        with attack(knock, least=20) as answers:
            got = epoch(node)
        context.term()
        assert got == undisturbed
        assert all(answers)
        assert status(node.address).refused >= len(answers)
    lines = [line for line in log.read_text().splitlines() if "not allowed" in line]
    key = zmq.curve_public(keys.secret).decode()
    assert len(lines) == 2, lines
    assert all(key in line for line in lines)
    [number] = re.findall(r"refused (\d+) times more", lines[1])
    assert int(number) >= len(answers) - 1


def test_without_keys_the_same_flood_grows_a_node(dataset_dir: Path) -> None:
    """The measurement finds what it looks for: a node without keys collects the endless parts of a message."""
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*", options=("--insecure",)) as node:
        before = reset_peak(node)
        _, then = FORMS["endless parts without a mechanism"]
        with connect(node) as connection, connection.makefile("rb") as file:
            connection.sendall(greeting(b"NULL"))
            assert b"NULL" in file.read(64)
            connection.sendall(READY)
            deadline = time.monotonic() + 20
            while peak_bytes(node) - before < GROWTH_BYTES:
                assert time.monotonic() < deadline
                connection.sendall(then)
        node.kill()
