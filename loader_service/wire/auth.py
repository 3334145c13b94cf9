"""Keys: who may connect to a node, and which node a client will believe.

CurveZMQ (RFC 26) encrypts and authenticates both ways, but libzmq lets every client key in unless somebody answers its
questions (ZAP, RFC 27). The :class:`Authenticator` does, from a list of allowed keys, and nodes always set a ZAP domain
with enforcement, so that without an authenticator nobody gets in.

A key is one line of 40 characters (Z85) in a file; lines that begin with # are comments. ``keygen DIR`` makes:

================== ============================== ==========================
file               what                           who needs it
================== ============================== ==========================
node.secret        the node's secret key          the node alone
node.key           the node's public key          every client
client.secret      a client's secret key          that client alone
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
KEY_CHARACTERS: Final = 40

_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_ZAP_FRAMES_CURVE: Final = 7  # version, request id, domain, address, identity, mechanism, key


@dataclass(frozen=True)
class NodeKeys:
    """What a node must know: its secret key, and the public keys of those who may connect (Z85)."""

    secret: bytes
    allowed: frozenset[bytes]


@dataclass(frozen=True)
class ClientKeys:
    """What a client must know: its own secret key, and the public key of its nodes (Z85)."""

    secret: bytes
    node: bytes


def generate(directory: Path) -> list[Path]:
    """Make a node's and a client's keys; returns the files made. Existing keys are never overwritten.

    Raises:
        KeyFileError: a file is there already, or cannot be written.
    """
    made = []
    for name, public in (("node", directory / "node.key"), ("client", directory / "allowed" / "client.key")):
        public_key, secret_key = zmq.curve_keypair()
        for path, key, mode in ((directory / f"{name}.secret", secret_key, 0o600), (public, public_key, 0o644)):
            kind = "secret" if mode == 0o600 else "public"
            _write(path, f"# loader-service: {kind} key of a {name}\n{key.decode()}\n", mode)
            made.append(path)
    return made


def node_keys(directory: Path) -> NodeKeys:
    """Read a node's keys from the directory that :func:`generate` made; add clients by adding files to ``allowed``.

    Raises:
        KeyFileError: a file is missing, malformed, or a secret that others can read.
    """
    allowed = frozenset(_read(path, secret=False) for path in sorted((directory / "allowed").glob("*.key")))
    if not allowed:
        raise KeyFileError(directory / "allowed", "there is no client's key in it, so nobody could connect")
    return NodeKeys(_read(directory / "node.secret", secret=True), allowed)


def client_keys(server_key: str | Path, client_key: str | Path) -> ClientKeys:
    """A client's keys, given as files.

    Args:
        server_key: file with the node's public key (``node.key``), or the 40 characters themselves.
        client_key: file with the client's secret key (``client.secret``).

    Raises:
        KeyFileError: a file is missing, malformed, or a secret that others can read.
    """
    text = str(server_key)
    node = _checked(text, Path("server_key")) if len(text) == KEY_CHARACTERS and not Path(text).exists() else None
    return ClientKeys(_read(Path(client_key), secret=True), node or _read(Path(server_key), secret=False))


def chosen_keys(server_key: str | Path | None, client_key: str | Path | None) -> ClientKeys | None:
    """A client's keys, or None if it was given none.

    Raises:
        OptionError: one was given without the other.
        KeyFileError: see :func:`client_keys`.
    """
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        missing = "server_key" if server_key is None else "client_key"
        raise OptionError(missing, None, "both keys or none: the node's public one and this client's secret one")
    return client_keys(server_key, client_key)


def secure_node(router: zmq.Socket[bytes], keys: NodeKeys) -> None:
    """Make a socket that is not yet bound take only clients that prove an allowed key."""
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(dealer: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Make a socket that is not yet connected believe only the node whose key it knows."""
    dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.node)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(keys.secret))


class Authenticator:
    """Answers libzmq's question, for each connection, whether its key may come in.

    Poll :attr:`socket` and call :meth:`answer` when it is readable. Must be made before the node's socket is bound.
    """

    def __init__(self, context: zmq.Context[Any], keys: NodeKeys) -> None:
        self._allowed = keys.allowed
        self.refused = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> str:
        """Answer one question; returns the address of who was refused, or an empty string."""
        frames = self.socket.recv_multipart()
        known = len(frames) == _ZAP_FRAMES_CURVE and frames[5] == b"CURVE" and frames[2] == DOMAIN
        welcome = known and len(frames[6]) == 32 and z85.encode(frames[6]) in self._allowed
        verdict = (b"200", b"OK") if welcome else (b"400", b"the key is not allowed")
        self.socket.send_multipart([b"1.0", frames[1] if len(frames) > 1 else b"", *verdict, b"", b""])
        self.refused += not welcome
        return "" if welcome else frames[3].decode("utf-8", "replace") if len(frames) > 3 else "somebody"

    def close(self) -> None:
        """Answer no more: from now on nobody gets in."""
        self.socket.close()


def _write(path: Path, text: str, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise KeyFileError(path, f"it cannot be made ({error.strerror})") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        mode = path.stat().st_mode
        lines = [line for line in path.read_text("ascii").splitlines() if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(path, f"it cannot be read ({error})") from error
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(path, f"others can read it (mode {mode & 0o777:o}); do `chmod 600 {path}`")
    if len(lines) != 1:
        raise KeyFileError(path, "it must hold one line with a key")
    return _checked(lines[0], path)


def _checked(text: str, path: Path) -> bytes:
    try:
        if len(text) != KEY_CHARACTERS or len(z85.decode(text.encode("ascii"))) != 32:
            raise ValueError("length")
    except (ValueError, KeyError, UnicodeEncodeError) as error:
        raise KeyFileError(path, f"what it holds is not a key of {KEY_CHARACTERS} characters (Z85)") from error
    return text.encode("ascii")
