"""ZeroMQ sockets, their monitor, and the waker of a poll loop.

Every socket of this project is made here, so that all of them have the same options: no linger, heartbeats from libzmq's
I/O thread, which work while Python is busy, and no high-water marks at a client, where credits bound the messages in flight. A
node does not trust its clients to keep to them, and bounds what waits in either direction.
"""

from __future__ import annotations

import ipaddress
import os
import socket as socketlib
import time
import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from loader_service.errors import AddressError, KeyRefused, printable
from loader_service.wire.auth import ClientKeys, NodeKeys, secure_client, secure_node
from loader_service.wire.messages import MAX_CLIENT_MESSAGE_BYTES

HEARTBEAT_INTERVAL_MS: Final = 1_000
HEARTBEAT_TIMEOUT_MS: Final = 5_000
"""Interval of ZMTP heartbeats, and the silence after which libzmq closes a connection; below NODE_SILENT_S."""

HANDSHAKE_MS: Final = 2_000
"""Time for a new connection to finish its handshake, before a node closes it: a peer without a key holds no connection for
longer."""

BACKLOG: Final = 1_024
"""Connections that may wait until a node accepts them. Of more than libzmq's 100 the kernel drops some, and their clients try
again after a second or more: during a flood, or when all clients return after a restart."""

UNREAD_REQUESTS: Final = 4
"""Messages of a connection, of up to MAX_CLIENT_MESSAGE_BYTES, that libzmq keeps for a busy dispatcher; the others wait in the
client. So a client with MAX_CONNECTIONS connections takes 1 MiB at most."""

RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 2_000
"""Pause before a lost client reconnects; libzmq doubles it up to the maximum."""

_LARGE_BLOCK_BYTES: Final = 31 << 20
"""A block just below the largest that changes glibc's thresholds (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB)."""

BYE_LINGER_MS: Final = 200
"""Time for a closing client's Bye to be sent."""

_SCHEMES: Final = ("tcp", "ipc")

MAX_IPC_PATH_BYTES: Final = 107
"""Length of the path of a socket: sun_path of unix(7), without its final zero."""


class ConnectionEvent(Enum):
    """Events of a client's connection, as libzmq's monitor reports them."""

    UP = auto()
    """The handshake succeeded."""
    DOWN = auto()
    """The connection is lost."""
    UNLISTED = auto()
    """The node does not allow this client's key."""
    MISMATCH = auto()
    """One side uses keys and the other does not."""
    UNPROVEN = auto()
    """The handshake broke off, as it does when the node has another key than the client expects."""


_EVENTS: Final[dict[int, ConnectionEvent]] = {
    zmq.Event.HANDSHAKE_SUCCEEDED: ConnectionEvent.UP,
    zmq.Event.DISCONNECTED: ConnectionEvent.DOWN,
    zmq.Event.HANDSHAKE_FAILED_AUTH: ConnectionEvent.UNLISTED,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: ConnectionEvent.MISMATCH,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: ConnectionEvent.UNPROVEN,
}
_UNPROVEN_IS_WRONG_KEY: Final = 3
"""Broken handshakes in a row, each while a ZeroMQ peer listened, that count as a wrong key. One is not enough: a node that
is just being stopped breaks one, too."""

_SIGNATURE_BYTES: Final = 10
_PROBE_S: Final = 0.5
_PROBE_BYTES: Final = 256
"""Length of the signature that a ZeroMQ peer sends to each new connection (ZMTP 3.1: ``ff``, eight bytes, ``7f``); the
seconds to wait for each of a peer's answers, and how many bytes of them tell what it is."""

_PROBE_EVERY_S: Final = 30.0
"""Seconds between two questions what listens at an address where handshakes break."""

# The greeting of ZMTP 3.0 (RFC 23) without keys, in two parts: signature and version, upon which the peer sends all of its own
# greeting; then mechanism, as-server and filler. A peer with keys would cut the connection at the second part.
_NULL: Final = b"NULL".ljust(20, b"\0")
_CURVE: Final = b"CURVE".ljust(20, b"\0")
_MECHANISM: Final = slice(12, 32)
_GREETING: Final = (b"\xff" + bytes(8) + b"\x7f\x03\x00", _NULL + bytes(32))
_GREETING_BYTES: Final = 64


def check_address(address: str) -> None:
    """Check the form of an address. libzmq's own error would not say what is wrong.

    Raises:
        AddressError: it is not a tcp:// or ipc:// address; the sentence says why.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in _SCHEMES or not rest:
        raise AddressError(address, "it must look like tcp://HOST:PORT or ipc://PATH")
    if scheme == "ipc":
        if len(os.fsencode(rest)) > MAX_IPC_PATH_BYTES:
            raise AddressError(address, f"its path is longer than the {MAX_IPC_PATH_BYTES} bytes that a socket may have; choose a shorter one")  # fmt: skip
        return
    try:
        # A node may bind tcp://HOST:* for any free port; urlsplit accepts numbers only.
        parts = urlsplit(address.removesuffix("*") + "0" if address.endswith(":*") else address)
        port = parts.port  # raises ValueError unless it is a number up to 65535
    except ValueError as error:
        raise AddressError(address, str(error)) from error
    if not parts.hostname or port is None:
        raise AddressError(address, "it must look like tcp://HOST:PORT")
    try:
        parts.hostname.encode("idna")  # as a look-up does, which has no thread to report to
    except UnicodeError as error:
        raise AddressError(address, "a label of its host name is empty or longer than 63 characters") from error


def is_local(address: str) -> bool:
    """Return whether only this machine can reach an address: ipc, or tcp on the loopback network."""
    if address.startswith("ipc://"):
        return True
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # other names may resolve to any address, so they count as remote


def bind_node(
    context: zmq.Context[Any], address: str, keys: NodeKeys | None = None, *, unread_messages: int = 1_000
) -> tuple[zmq.Socket[bytes], str]:
    """Bind a node's ROUTER; return it and its address (tcp://127.0.0.1:* becomes an address with a port).

    Args:
        context: the node's context; with keys, its :class:`auth.Authenticator` must exist already.
        address: the address to listen at.
        keys: the node's keys, as :func:`access.keys_to_serve` chooses them; None serves everybody who can connect.
        unread_messages: upper bound of the messages that wait for one connection of a client that does not read.

    Raises:
        AddressError: the address is malformed, in use, or not one of this machine.
    """
    check_address(address)
    if address.startswith("ipc://"):
        _refuse_if_taken(address)  # only ipc: for tcp the bind itself fails
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _prepare(router, address)
    # These replace the 0 of _prepare: a client may never read, and may send more than a dispatcher can process.
    router.setsockopt(zmq.SNDHWM, unread_messages)
    router.setsockopt(zmq.RCVHWM, UNREAD_REQUESTS)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a lost client is an error; the default drops it silently
    router.setsockopt(
        zmq.ROUTER_HANDOVER, 1
    )  # a client that reconnects takes its identity over from its dead connection
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.BACKLOG, BACKLOG)
    # The node only: the messages to clients carry frames of pixels.
    router.setsockopt(zmq.MAXMSGSIZE, MAX_CLIENT_MESSAGE_BYTES)
    if keys is not None:
        secure_node(router, keys)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close()
        raise AddressError(address, f"it cannot be bound ({error.strerror})") from error
    return router, router.getsockopt_string(zmq.LAST_ENDPOINT)  # with the port that the kernel chose for *


def connect_client(
    context: zmq.Context[Any], address: str, identity: bytes, keys: ClientKeys | None = None, *, judges: bool = True
) -> tuple[zmq.Socket[bytes], Monitor]:
    """Connect a client's DEALER; return it and its monitor. libzmq tries to connect until the socket is closed.

    Args:
        context: the client's context.
        address: the node's address.
        identity: the client's 16 random bytes, kept over reconnections; nobody can guess them.
        keys: the client's keys, for a node that has keys.
        judges: see :class:`Monitor`.

    Raises:
        AddressError: the address is malformed or its name cannot be resolved.
    """
    check_address(address)
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    _prepare(dealer, address)
    dealer.setsockopt(zmq.ROUTING_ID, identity)  # before connect: the handshake carries it
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing while there is no connection
    dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    if keys is not None:
        secure_client(dealer, keys)
    monitor = Monitor(dealer, address, keys, judges=judges)  # before connect, so that it misses no event
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        monitor.close()
        dealer.close()
        raise AddressError(address, f"it cannot be connected to ({error.strerror})") from error
    return dealer, monitor


class Monitor:
    """The monitor of a client's socket: it reports connections, losses, and keys that do not match.

    Args:
        dealer: the socket.
        address: the node's address.
        keys: the client's keys.
        judges: whether broken handshakes say what listens there. Those of a lane do not: it exists because the node is known,
            which may have no descriptor left for it. A judge dials the node, and so may block the thread for a moment.
    """

    def __init__(self, dealer: zmq.Socket[bytes], address: str, keys: ClientKeys | None, *, judges: bool) -> None:
        self._dealer, self._address, self._keys, self._judges = dealer, address, keys, judges
        self._unproven, self._proven = 0, False
        self._up, self._probed_at = False, -_PROBE_EVERY_S
        self.socket = dealer.get_monitor_socket(sum(_EVENTS))  # each event is one bit, so the sum is the mask

    def events(self) -> list[bool]:
        """Return the changes since the last call, in order: True for connected, False for lost.

        Raises:
            KeyRefused: client and node do not accept each other's keys, so that another attempt is useless.
            AddressError: something else than a node listens there.
        """
        happened = []
        while self.socket.poll(0):  # libzmq's I/O thread writes events at any time: take all there are
            event = _EVENTS[recv_monitor_message(self.socket)["event"]]
            if self._judges:
                self._judge(event)
            happened.append(event is ConnectionEvent.UP)
        return happened

    def _judge(self, event: ConnectionEvent) -> None:
        self._count(event)
        if reason := self._refusal(event):
            raise KeyRefused(self._address, reason)
        self._check_listener(event)

    def _check_listener(self, event: ConnectionEvent) -> None:
        """Ask the peer what it is if a connection broke before its handshake.

        Raises:
            AddressError: it is no node.
            KeyRefused: one side uses keys and the other does not.
        """
        broken = event is ConnectionEvent.DOWN and not self._up
        self._up = event is ConnectionEvent.UP or (self._up and event is not ConnectionEvent.DOWN)
        if broken and time.monotonic() - self._probed_at >= _PROBE_EVERY_S:
            self._probed_at = time.monotonic()
            said = _first_bytes(self._address)
            if other := _other_service(said):
                raise AddressError(self._address, f"{other} listens there, not a node")
            # If one side uses keys, each breaks the handshake, and the side that is slower does not learn why.
            if _has_signature(said) and said[_MECHANISM] == (_NULL if self._keys else _CURVE):
                raise KeyRefused(self._address, self._refusal(ConnectionEvent.MISMATCH))

    def _count(self, event: ConnectionEvent) -> None:
        """Count broken handshakes in a row.

        A proxy that accepts connections for a node that is down breaks handshakes, too. So a broken handshake counts only
        if a ZeroMQ peer answers at the address. Nor does it count once the node has proved its key: a slow link, a busy node
        and one without descriptors break handshakes that were good before.
        """
        self._proven = self._proven or event is ConnectionEvent.UP
        if event is ConnectionEvent.UNPROVEN and self._keys and not self._proven:
            # _is_zeromq dials the node and may block this thread for about a second.
            self._unproven = self._unproven + 1 if _is_zeromq(self._address) else 0
        elif event is not ConnectionEvent.DOWN:  # libzmq reports DOWN after each broken handshake, too
            self._unproven = 0

    def _refusal(self, event: ConnectionEvent) -> str:
        if event is ConnectionEvent.UNLISTED:
            return "this client's key is not on the node's list; put its public key into the node's allowed/ and restart the node"
        if event is ConnectionEvent.MISMATCH and not self._keys:
            return "the node demands keys, and this client connects without; give server_key and client_key, or leave out insecure for a node of this user at a loopback address"  # fmt: skip
        # If the node has no keys at all, libzmq reports either MISMATCH or UNPROVEN: it is a race between both sides.
        if self._keys and (event is ConnectionEvent.MISMATCH or self._unproven >= _UNPROVEN_IS_WRONG_KEY):
            if self._keys.folder:
                return f"the node there does not prove this user's key ({self._keys.folder / 'node.key'}): it belongs to another user, or was started with --keys or --insecure; give its server_key and client_key (insecure=True or --insecure for a node without keys), or start a node of your own at another port"  # fmt: skip
            return (
                "the node there does not prove the key that server_key names: it has another key, or was started without "
                "--keys; give its own node.key, or insecure=True (--insecure) instead of the keys if it has none"
            )
        return ""

    def close(self) -> None:
        """Stop monitoring. Call it before the monitored socket is closed."""
        self._dealer.disable_monitor()
        self.socket.close(linger=0)


class Waker:
    """An eventfd that wakes a poll loop from any thread, signal handler or finaliser.

    Poll :meth:`fileno`; :meth:`wake` makes it readable until :meth:`clear`. It is closed when it is collected, and so never
    while a thread is inside of :meth:`wake`: another file could have the same number by then.
    """

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # threads go on until the process ends
        self._pid = os.getpid()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._descriptor

    def wake(self) -> None:
        """Wake the loop, if it still polls. Safe to call from anywhere."""
        if self._pid == os.getpid():  # a forked child has no loop, and its descriptor is the parent's
            os.eventfd_write(self._descriptor, 1)  # adds to a counter: many wakes before a clear are one

    def clear(self) -> None:
        """Make the descriptor unreadable again. Call it before looking for the work, so that no wake-up is missed."""
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:  # the counter is 0: nobody has called wake since the last clear
            return


def try_send(socket: zmq.Socket[bytes], frames: list[Any], on_gone: Callable[[], None] | None = None) -> bool:
    """Send one message without waiting and without copying its frames.

    Args:
        socket: the socket to send on.
        frames: the frames of the message; libzmq keeps references to them until they are sent.
        on_gone: called if the message cannot be sent.

    Returns:
        False if the peer is gone (EHOSTUNREACH) or does not read (EAGAIN: its queue is full).
    """
    try:
        # libzmq accepts or rejects a message at its first frame, so none is sent in part.
        # pyzmq still copies frames below 64 KiB (Socket.copy_threshold): tracking them would cost more.
        socket.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise
        if on_gone:
            on_gone()
        return False
    return True


def _is_zeromq(address: str) -> bool:
    """Return whether a ZeroMQ peer listens at the address now; a proxy closes the connection or says nothing."""
    # libzmq sends its signature before it reads anything.
    return _has_signature(_first_bytes(address))


def _has_signature(said: bytes) -> bool:
    return len(said) >= _SIGNATURE_BYTES and said[0] == 0xFF and said[_SIGNATURE_BYTES - 1] == 0x7F


def _other_service(said: bytes) -> str:
    """Return a name for what sent these first bytes, for people; empty if it may be a node, or a relay of one."""
    if said and said[0] != 0xFF:
        return f"a service that answers {printable(repr(said[:40]))}"
    _, found, value = said.partition(b"\x0bSocket-Type")  # a name and a value, each after its length
    kind = value[4 : 4 + int.from_bytes(value[:4], "big")].decode("ascii", "replace")
    return f"a ZeroMQ socket of type {printable(kind)}" if found and kind != "ROUTER" else ""


def _first_bytes(address: str) -> bytes:
    """Greet what listens at an address, and return what it answers."""
    said = b""
    try:
        with _dial(address) as probe:
            probe.settimeout(_PROBE_S)
            probe.sendall(_GREETING[0])
            while len(said) < _GREETING_BYTES and (more := probe.recv(_GREETING_BYTES - len(said))):
                said += more
            if said[_MECHANISM] == _NULL:
                probe.sendall(_GREETING[1])
                said += probe.recv(_PROBE_BYTES)  # one message of some 30 bytes: the type of the socket
    except OSError:  # also a timeout: a peer that has said all waits for us
        return said
    return said


def _dial(address: str) -> socketlib.socket:
    if address.startswith("tcp://"):
        parts = urlsplit(address)
        return socketlib.create_connection((parts.hostname, parts.port), _PROBE_S)
    probe = socketlib.socket(socketlib.AF_UNIX)
    try:
        probe.connect(address.removeprefix("ipc://"))
    except OSError:
        probe.close()
        raise
    return probe


def keep_freed_frames() -> None:
    """Make malloc reuse the memory of freed frames.

    glibc returns free memory at the end of its heap to the kernel above a threshold, and every new frame then faults its
    pages in again. The threshold adapts: it becomes twice the largest mmapped block that was freed so far (mallopt(3),
    M_TRIM_THRESHOLD). So this function allocates and frees one large block, without touching its pages. Another malloc is
    not affected.
    """
    np.empty(_LARGE_BLOCK_BYTES, np.uint8)  # freed at the end of this statement; no page was touched


def _refuse_if_taken(address: str) -> None:
    """Raise AddressError if a process listens at an ipc address. libzmq would replace its socket without an error."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return  # no such file, or the socket of a dead process
    raise AddressError(address, "it cannot be bound (Address already in use)")


def _prepare(socket: zmq.Socket[bytes], address: str) -> None:
    for option, value in (
        (zmq.LINGER, 0),  # ms that close() waits for unsent messages
        (zmq.SNDHWM, 0),  # no limit
        (zmq.RCVHWM, 0),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),  # the same timeout for the peer
        (zmq.IPV6, int("[" in address)),  # only for tcp://[HOST]:PORT; with it, tcp://*:PORT would bind IPv6 too
    ):
        socket.setsockopt(option, value)
