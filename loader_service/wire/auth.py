"""Keys and authentication: the clients that a node accepts, and the node that a client accepts.

CurveZMQ (RFC 26) encrypts a connection and lets each side prove its key. libzmq accepts any client key unless a handler
answers its authentication requests (ZAP, RFC 27). The :class:`Authenticator` is that handler; it accepts the keys on a
list. A node with keys also sets ZAP_ENFORCE_DOMAIN: while no handler runs, libzmq then rejects every key instead of
accepting every key.

A key file holds one line of 40 characters (Z85); lines that begin with # are comments. ``keygen DIR`` makes:

================== ============================== ==========================
file               content                        needed by
================== ============================== ==========================
node.secret        the node's secret key          the node only
node.key           the node's public key          every client
client.secret      a client's secret key          that client only
allowed/client.key that client's public key       the node
================== ============================== ==========================
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.utils import z85

from loader_service.errors import KeyFileError, OptionError

DOMAIN: Final = b"loader-service"
"""ZAP domain of every node's socket."""

KEY_CHARACTERS: Final = 40
"""Length of a key in Z85: 5 characters for each 4 of its 32 bytes."""

_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"  # fixed by RFC 27
_ZAP_FRAMES_CURVE: Final = 7  # version, request id, domain, address, identity, mechanism, key


@dataclass(frozen=True)
class NodeKeys:
    """The keys of a node: its secret key, and the public keys of the clients that may connect (Z85)."""

    secret: bytes
    allowed: frozenset[bytes]


@dataclass(frozen=True)
class ClientKeys:
    """The keys of a client.

    Fields:
        secret: its own secret key (Z85).
        node: the public key of its nodes (Z85).
        folder: the folder of the user's own keys, if these are they; None for keys that an option names.
    """

    secret: bytes
    node: bytes
    folder: Path | None = None


def generate(directory: Path) -> list[Path]:
    """Write new keys of a node and a client, and return the paths of the files. Existing files are never overwritten.

    Raises:
        KeyFileError: a file exists already, or cannot be written.
    """
    made = []
    for name, public in (("node", directory / "node.key"), ("client", directory / "allowed" / "client.key")):
        public_key, secret_key = zmq.curve_keypair()  # Z85 text, not the 32 raw bytes
        for path, key, mode in ((directory / f"{name}.secret", secret_key, 0o600), (public, public_key, 0o644)):
            # 0600 marks a secret; _read refuses one that others can read.
            kind = "secret" if mode == 0o600 else "public"
            _write(path, f"# loader-service: {kind} key of a {name}\n{key.decode()}\n", mode)
            made.append(path)
    return made


def node_keys(directory: Path) -> NodeKeys:
    """Read a node's keys from a directory that :func:`generate` made. Each file in ``allowed`` lets one client in.

    Raises:
        KeyFileError: a file is missing or malformed, or others can read a secret.
    """
    allowed = frozenset(_read(path, secret=False) for path in sorted((directory / "allowed").glob("*.key")))
    if not allowed:  # an empty list is a mistake of the operator: the node would start and serve nobody
        raise KeyFileError(directory / "allowed", "it holds no client's key, so nobody could connect")
    return NodeKeys(_read(directory / "node.secret", secret=True), allowed)


def client_keys(server_key: str | Path, client_key: str | Path) -> ClientKeys:
    """Read a client's keys.

    Args:
        server_key: path of the node's public key (``node.key``), or the 40 characters of the key.
        client_key: path of the client's secret key (``client.secret``).

    Raises:
        KeyFileError: a file is missing or malformed, or others can read a secret.
    """
    text = str(server_key)
    # Text of a key's length is the key itself, unless a file has that name. The path stands for the option in errors.
    node = _checked(text, Path("server_key")) if len(text) == KEY_CHARACTERS and not Path(text).exists() else None
    return ClientKeys(_read(Path(client_key), secret=True), node or _read(Path(server_key), secret=False))


def chosen_keys(server_key: str | Path | None, client_key: str | Path | None) -> ClientKeys | None:
    """Return the keys that a client's options name, or None if both are None.

    Raises:
        OptionError: one is given without the other.
        KeyFileError: see :func:`client_keys`.
    """
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        missing = "server_key" if server_key is None else "client_key"
        raise OptionError(missing, None, "both keys or neither: the node's public key and this client's secret key")
    return client_keys(server_key, client_key)


def secure_node(router: zmq.Socket[bytes], keys: NodeKeys) -> None:
    """Restrict a node's socket to clients that prove an allowed key. Call it before the socket is bound."""
    # CURVE's roles do not depend on bind and connect: the server is the end whose key the other knows beforehand.
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler, reject all keys instead of accepting all


def secure_client(dealer: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Restrict a client's socket to the node that proves its key. Call it before the socket is connected."""
    dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.node)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(keys.secret))  # libzmq needs both halves of the pair


@dataclass(frozen=True)
class Refusal:
    """A client that the authenticator refused: its key (Z85; empty if it is none) and the address that it came from."""

    key: str
    address: str


class RefusalLog:
    """The log lines about refused clients: few, however often they try.

    A key that is refused has a line at once. Its later refusals are counted, and have one line at the end of each interval.
    Only MAX_KEYS keys have lines of their own; a peer that makes up new ones cannot make the log or this object grow.
    """

    INTERVAL_S: Final = 60.0
    MAX_KEYS: Final = 16

    def __init__(self) -> None:
        self._counts: dict[
            str, int
        ] = {}  # refusals since a key's last line; the empty key stands for all beyond MAX_KEYS
        self._addresses: dict[str, str] = {}  # the last one of each key
        self._due = 0.0  # end of the interval

    def add(self, refusal: Refusal, now: float) -> list[str]:
        """Count a refusal; return the lines to log."""
        lines = self.due(now)
        if not self._counts:
            self._due = now + self.INTERVAL_S
        key = refusal.key if refusal.key in self._counts or len(self._counts) < self.MAX_KEYS else ""
        if key in self._counts:
            self._counts[key] += 1
        else:
            self._counts[key] = 0
            what = f"its key {key} is not allowed" if key else "its key is not allowed; more such keys are only counted"
            lines.append(f"a client at {refusal.address} was refused: {what}")
        self._addresses[key] = refusal.address
        return lines

    def due(self, now: float, *, closing: bool = False) -> list[str]:
        """Return the lines to log at the end of an interval, or now if the node closes."""
        if not self._counts or (now < self._due and not closing):
            return []
        again = {key: count for key, count in self._counts.items() if count}
        lines = [
            f"{f'clients with the key {key}' if key else 'clients with other keys'} were refused {count} times more, the last "
            f"at {self._addresses[key]}: the key is not allowed"
            for key, count in again.items()
        ]
        # A key that goes on is only counted again, for the next interval; one that has stopped is forgotten.
        self._counts = dict.fromkeys(again, 0)
        self._addresses = {key: self._addresses[key] for key in again}
        self._due = now + self.INTERVAL_S
        return lines


class Authenticator:
    """The ZAP handler of a node: it answers libzmq, for each connection, whether the client's key is allowed.

    Poll :attr:`socket` and call :meth:`answer` when it is readable. Create the authenticator before the node's socket is
    bound, since libzmq rejects clients as long as no handler runs.
    """

    def __init__(self, context: zmq.Context[Any], keys: NodeKeys) -> None:
        self._allowed = keys.allowed
        # libzmq's I/O threads are the clients of this socket; it serves every socket of the context.
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0  # an unsent answer must not delay context.term()
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> Refusal | None:
        """Answer one request; return the refusal if the client may not connect."""
        frames = self.socket.recv_multipart()
        # libzmq itself sends these frames; the checks guard against another mechanism on the same context.
        known = len(frames) == _ZAP_FRAMES_CURVE and frames[5] == b"CURVE" and frames[2] == DOMAIN
        # The frame has the raw key, the list has Z85.
        welcome = known and len(frames[6]) == 32 and z85.encode(frames[6]) in self._allowed
        # Status codes of RFC 27; for 400 the client's monitor reports HANDSHAKE_FAILED_AUTH.
        verdict = (b"200", b"OK") if welcome else (b"400", b"the key is not allowed")
        # Malformed requests get an answer, too: a REP socket receives nothing more before it has answered.
        # The two empty frames are the user id and the metadata of RFC 27.
        self.socket.send_multipart([b"1.0", frames[1] if len(frames) > 1 else b"", *verdict, b"", b""])
        if welcome:
            return None
        key = z85.encode(frames[6]).decode() if known and len(frames[6]) == 32 else ""
        return Refusal(key, frames[3].decode("utf-8", "replace") if len(frames) > 3 else "an unknown address")

    def close(self) -> None:
        """Stop answering; libzmq rejects every client from now on."""
        self.socket.close()


def _write(path: Path, text: str, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL: never overwrite a key. The mode is set at creation, so that a secret is never readable by others.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a crash of the machine must not leave an empty key
    except OSError as error:
        raise KeyFileError(path, f"it cannot be created ({error.strerror})") from error


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        mode = path.stat().st_mode
        lines = [line for line in path.read_text("ascii").splitlines() if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(path, f"it cannot be read ({error})") from error
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):  # a public key may be readable, a secret may not
        raise KeyFileError(path, f"others can read it (mode {mode & 0o777:o}); run `chmod 600 {path}`")
    if len(lines) != 1:
        raise KeyFileError(path, "it must hold exactly one line with a key")
    return _checked(lines[0], path)


def _checked(text: str, path: Path) -> bytes:
    try:
        if len(text) != KEY_CHARACTERS or len(z85.decode(text.encode("ascii"))) != 32:
            raise ValueError("length")
    except (ValueError, KeyError, UnicodeEncodeError) as error:  # KeyError: z85.decode looks characters up in a table
        raise KeyFileError(path, f"its content is not a key of {KEY_CHARACTERS} characters (Z85)") from error
    return text.encode("ascii")
