"""The only maker of ZeroMQ sockets, so that no socket lacks what every socket needs.

High-water marks are off where credits bound what may be in flight; a node bounds what waits for a client that reads
nothing. Heartbeats are libzmq's own, sent by its I/O thread whatever Python does. Nothing lingers at the end.
"""

from __future__ import annotations

import ipaddress
import os
import socket as socketlib
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from loader_service.errors import AddressError, KeyRefused, OptionError
from loader_service.wire.auth import ClientKeys, NodeKeys, secure_client, secure_node
from loader_service.wire.messages import MAX_CLIENT_MESSAGE_BYTES

HEARTBEAT_INTERVAL_MS: Final = 1_000
HEARTBEAT_TIMEOUT_MS: Final = 5_000
UNREAD_MESSAGES: Final = 1_000
"""Most messages that a node keeps for a client that does not read them; an honest one has fewer requests under way."""

RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 2_000
_LESSON_BYTES: Final = 31 << 20
"""Just below the largest block that glibc learns from (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB)."""

BYE_LINGER_MS: Final = 200
"""How long a closing client's goodbye may take to leave."""

_SCHEMES: Final = ("tcp", "ipc")


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
"""Handshakes in a row that broke off, with a node there each time, before the key is blamed: a node that is just being
stopped breaks one off too."""

_SIGNATURE_BYTES: Final = 10
_SIGNATURE_S: Final = 0.5
"""A ZeroMQ peer says ``ff``, eight bytes and ``7f`` as soon as somebody connects (ZMTP 3.1, its signature)."""


def check_address(address: str) -> None:
    """Refuse what is no tcp:// or ipc:// address before libzmq does it with fewer words.

    Raises:
        AddressError: naming what is wrong with it.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in _SCHEMES or not rest:
        raise AddressError(address, "it must look like tcp://HOST:PORT or ipc://PATH")
    if scheme == "ipc":
        return
    try:
        parts = urlsplit(address.removesuffix("*") + "0" if address.endswith(":*") else address)
        port = parts.port
    except ValueError as error:
        raise AddressError(address, str(error)) from error
    if not parts.hostname or port is None:
        raise AddressError(address, "it must look like tcp://HOST:PORT")


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address: ipc, or tcp on the loopback network."""
    if address.startswith("ipc://"):
        return True
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_node(
    context: zmq.Context[Any], address: str, keys: NodeKeys | None = None, *, insecure: bool = False
) -> tuple[zmq.Socket[bytes], str]:
    """A node's ROUTER, bound; and the address it really has (tcp://127.0.0.1:* gets a port).

    Args:
        context: the node's; with keys, its :class:`keys.Authenticator` is made already.
        address: to listen at.
        keys: the node's; without them only this machine may reach the address.
        insecure: let other machines reach it without keys all the same.

    Raises:
        OptionError: others could reach the address, and there are no keys.
        AddressError: the address is malformed, taken or not ours.
    """
    check_address(address)
    if keys is None and not insecure and not is_local(address):
        raise OptionError("bind", address, "keys (`loader-service keygen DIR`, then --keys DIR), since strangers could reach it; or --insecure, on a network without any")  # fmt: skip
    if address.startswith("ipc://"):
        _refuse_if_taken(address)
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _prepare(router, address)
    router.setsockopt(zmq.SNDHWM, UNREAD_MESSAGES)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to who is gone is an error, not silence
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects keeps its identity
    router.setsockopt(zmq.MAXMSGSIZE, MAX_CLIENT_MESSAGE_BYTES)
    if keys is not None:
        secure_node(router, keys)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close()
        raise AddressError(address, f"it cannot be bound ({error.strerror})") from error
    return router, router.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_client(
    context: zmq.Context[Any], address: str, identity: bytes, keys: ClientKeys | None = None
) -> tuple[zmq.Socket[bytes], Monitor]:
    """A client's DEALER, connecting, and its monitor; libzmq goes on trying for as long as the socket lives.

    Args:
        context: the client's.
        address: of the node.
        identity: 16 random bytes; the same over reconnections, and not to be guessed by others.
        keys: the client's, for a node that has keys.

    Raises:
        AddressError: the address is malformed or its name cannot be resolved.
    """
    check_address(address)
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    _prepare(dealer, address)
    dealer.setsockopt(zmq.ROUTING_ID, identity)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a node that is not there
    dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    if keys is not None:
        secure_client(dealer, keys)
    monitor = Monitor(dealer, address, keyed=keys is not None)  # before the connection is made, so that it sees it
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        monitor.close()
        dealer.close()
        raise AddressError(address, f"it cannot be connected to ({error.strerror})") from error
    return dealer, monitor


class Monitor:
    """Tells when a client's socket has a working connection, when it has lost it, and when keys forbid it."""

    def __init__(self, dealer: zmq.Socket[bytes], address: str, *, keyed: bool) -> None:
        self._dealer, self._address, self._keyed = dealer, address, keyed
        self._unproven = 0
        self.socket = dealer.get_monitor_socket(sum(_EVENTS))

    def events(self) -> list[bool]:
        """What has happened since the last call, in order: True for connected, False for lost.

        Raises:
            KeyRefused: client and node do not accept each other's keys, and will not by trying again.
        """
        happened = []
        while self.socket.poll(0):
            event = _EVENTS[recv_monitor_message(self.socket)["event"]]
            self._count(event)
            if reason := self._refusal(event):
                raise KeyRefused(self._address, reason)
            happened.append(event is ConnectionEvent.UP)
        return happened

    def _count(self, event: ConnectionEvent) -> None:
        """Handshakes break off too where a relay accepts connections for a node that is not there; no key is to blame then."""
        if event is ConnectionEvent.UNPROVEN and self._keyed:
            self._unproven = self._unproven + 1 if _is_zeromq(self._address) else 0
        elif event is not ConnectionEvent.DOWN:
            self._unproven = 0

    def _refusal(self, event: ConnectionEvent) -> str:
        if event is ConnectionEvent.UNLISTED:
            return "this client's key is not on the node's list; put its public key into the node's allowed/ and restart it"
        if event is ConnectionEvent.MISMATCH and not self._keyed:
            return "the node demands keys; give server_key and client_key (`loader-service keygen` makes them)"
        # Whether libzmq gets to see that the other side has no keys at all is a race.
        if self._keyed and (event is ConnectionEvent.MISMATCH or self._unproven >= _UNPROVEN_IS_WRONG_KEY):
            return (
                "the node there does not prove the key that server_key names: it has another, or it was started without "
                "--keys; give its own node.key, or leave both keys out"
            )
        return ""

    def close(self) -> None:
        """Stop watching; before the watched socket is closed."""
        self._dealer.disable_monitor()
        self.socket.close(linger=0)


class Waker:
    """An eventfd: poll :meth:`fileno`; :meth:`wake` makes it readable until :meth:`clear`."""

    def __init__(self) -> None:
        # Between looking at the descriptor and writing to it, it must not become another file's. Reentrant, because a
        # finaliser or signal handler may run within any of these methods.
        self._lock = threading.RLock()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._descriptor

    def wake(self) -> None:
        """Wake the loop; does nothing once closed. Safe to call from anywhere."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Make it unreadable again; before looking at what it was woken for, so that nothing is missed."""
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)


def try_send(socket: zmq.Socket[bytes], frames: list[Any], on_gone: Callable[[], None] | None = None) -> bool:
    """Send without waiting and, for large frames, without copying; False if the peer is not there, or does not read."""
    try:
        socket.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise
        if on_gone:
            on_gone()
        return False
    return True


def _is_zeromq(address: str) -> bool:
    """Whether a ZeroMQ peer is there now, and not somebody who hangs up or says nothing."""
    try:
        with _dial(address) as probe:
            probe.settimeout(_SIGNATURE_S)
            signature = probe.recv(_SIGNATURE_BYTES, socketlib.MSG_WAITALL)
    except OSError:
        return False
    return len(signature) == _SIGNATURE_BYTES and signature[0] == 0xFF and signature[-1] == 0x7F


def _dial(address: str) -> socketlib.socket:
    if address.startswith("tcp://"):
        parts = urlsplit(address)
        return socketlib.create_connection((parts.hostname, parts.port), _SIGNATURE_S)
    probe = socketlib.socket(socketlib.AF_UNIX)
    try:
        probe.connect(address.removeprefix("ipc://"))
    except OSError:
        probe.close()
        raise
    return probe


def keep_freed_frames() -> None:
    """Have malloc keep the memory of frames that are done with for those that come next.

    glibc gives free memory at a heap's end back to the kernel from a threshold on that it learns: twice the largest
    block of its own mapping that was freed so far (mallopt(3), M_TRIM_THRESHOLD). Without a lesson, much of each frame's
    memory is given back and faulted in again. Freeing one large block, which nobody touches, is the lesson; where malloc
    is another, nothing happens.
    """
    np.empty(_LESSON_BYTES, np.uint8)


def _refuse_if_taken(address: str) -> None:
    """Whether somebody listens at an ipc address: libzmq would take the name over without a word."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return  # nobody, or the socket of somebody who is gone
    raise AddressError(address, "it cannot be bound (Address already in use)")


def _prepare(socket: zmq.Socket[bytes], address: str) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
        (zmq.IPV6, int("[" in address)),
    ):
        socket.setsockopt(option, value)
