"""Access: the keys with which a node serves an address, and with which a client connects to one.

Options that name keys win over everything else. Without them the address decides:

============================ =================================================================================
address                      keys
============================ =================================================================================
tcp on loopback              the user's own keys, which node and client of one user find by themselves
ipc                          none, but only in a folder that no other user can open
tcp on any other address     refused: keys must be named
============================ =================================================================================

Connections without keys over TCP need ``insecure`` at both ends. No end ever tries again without keys after a refusal.

The user's own keys are in ``$XDG_CONFIG_HOME/loader-service`` (by default ``~/.config/loader-service``), with the layout of
``keygen``. Whoever needs them first makes them: in a folder beside it, which is then renamed. So no process ever sees half of
them, and if several processes make them at once, all use those of the one that was first.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loader_service.errors import KeyFileError, KeyRefused, OptionError
from loader_service.wire.auth import ClientKeys, NodeKeys, chosen_keys, client_keys, generate, node_keys
from loader_service.wire.sockets import check_address, is_local

FOLDER: Final = "loader-service"
"""Name of the folder of the user's own keys."""

_INSTEAD: Final = (
    "set XDG_CONFIG_HOME to a folder that this user can write; or name keys of your own (`loader-service keygen DIR`, then "
    "--keys DIR), use an ipc address, or do without keys (--insecure)"
)


@dataclass(frozen=True)
class Access:
    """The keys of a client's connections, by kind of address; None connects without keys."""

    tcp: ClientKeys | None
    ipc: ClientKeys | None

    def keys_for(self, address: str) -> ClientKeys | None:
        """Return the keys for one address, which may be one of those behind a name."""
        return self.ipc if _is_ipc(address) else self.tcp


def keys_to_serve(bind: str, directory: Path | None = None, *, insecure: bool = False) -> NodeKeys | None:
    """Return the keys with which a node serves an address; None serves everybody who can reach it.

    Args:
        bind: the address to listen at.
        directory: the directory that ``--keys`` names.
        insecure: serve without keys, unless ``directory`` is given.

    Raises:
        OptionError: others could reach the address, and no keys are named.
        KeyFileError: the keys cannot be read, or the user's own can neither be read nor made.
        AddressError: the address is malformed.
    """
    check_address(bind)
    if directory is not None:
        return node_keys(directory)
    if insecure:
        return None
    if _is_ipc(bind):
        if exposure := _exposure(_socket_folder(bind)):
            raise OptionError("bind", bind, f"a socket in a folder that only this user can open, since other users could connect ({exposure}); or keys (--keys DIR), or --insecure")  # fmt: skip
        return None
    if is_local(bind):
        folder = own_keys()
        with _remedy(folder):
            return node_keys(folder)
    raise OptionError("bind", bind, "keys (`loader-service keygen DIR`, then --keys DIR), since other machines could reach this address; or --insecure, on a trusted network")  # fmt: skip


def access(
    addresses: Iterable[str],
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
    *,
    insecure: bool = False,
) -> Access:
    """Return the keys with which a client connects to these addresses.

    Args:
        addresses: addresses of nodes.
        server_key: the node's public key, as :func:`auth.chosen_keys` takes it.
        client_key: the client's secret key, likewise.
        insecure: connect without keys, unless these are given.

    Raises:
        OptionError: one key is given without the other.
        KeyRefused: no keys are given for an address where another user's node may answer.
        KeyFileError: keys cannot be read, or the user's own can neither be read nor made.
        AddressError: an address is malformed.
    """
    addresses = tuple(addresses)
    for address in addresses:
        check_address(address)
    keys = chosen_keys(server_key, client_key)
    if keys or insecure:
        return Access(tcp=keys, ipc=keys)
    for address in addresses:
        if not is_local(address):
            raise KeyRefused(address, "other machines can answer there, so it needs keys: give server_key and client_key (`loader-service keygen` makes them), or insecure=True (--insecure) for a node without keys on a trusted network")  # fmt: skip
        # The folder may be made later, by the node.
        if _is_ipc(address) and _socket_folder(address).exists() and (exposure := _exposure(_socket_folder(address))):
            raise KeyRefused(address, f"another user's node may answer there ({exposure}); give server_key and client_key, or insecure=True (--insecure)")  # fmt: skip
    if all(map(_is_ipc, addresses)):
        return Access(tcp=None, ipc=None)
    folder = own_keys()
    with _remedy(folder):
        own = client_keys(folder / "node.key", folder / "client.secret")
    return Access(tcp=ClientKeys(own.secret, own.node, folder), ipc=None)


def own_folder() -> Path:
    """Return the path of the user's own keys, which need not exist.

    Raises:
        KeyFileError: the user has no home directory.
    """
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(configured).is_absolute():  # the specification says to ignore a relative one
        return Path(configured) / FOLDER
    try:
        return Path.home() / ".config" / FOLDER
    except RuntimeError as error:  # no HOME, and no entry in the user database, as in some containers
        reason = f"this user has no home directory; {_INSTEAD}"
        raise KeyFileError(f"~/.config/{FOLDER}", reason, "folder of keys") from error


def own_keys() -> Path:
    """Return the folder of the user's own keys; make them first if there are none.

    Raises:
        KeyFileError: they cannot be made, or another user may have read or changed them.
    """
    folder = own_folder()
    try:
        if not folder.exists() or not any(folder.iterdir()):
            _make(folder)
        exposure = _exposure(folder)
    except (OSError, KeyFileError) as error:
        raise KeyFileError(
            folder, f"it can neither be read nor made ({error}); {_INSTEAD}", "folder of keys"
        ) from error
    if exposure:
        reason = f"{exposure}. If another user may have changed its keys, remove it: the next start makes new ones"
        raise KeyFileError(folder, reason, "folder of keys")
    return folder


def _make(folder: Path) -> None:
    """Make new keys at ``folder``, unless another process is faster."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))  # mode 0700
    try:
        generate(made)
        # Atomic. It replaces an empty folder, and fails if there are keys already: those of a faster process.
        made.rename(folder)
    except OSError:
        if not folder.exists() or not any(folder.iterdir()):
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)  # what was not renamed


@contextmanager
def _remedy(folder: Path) -> Iterator[None]:
    """Add what to do to the error of a file of the user's own keys."""
    try:
        yield
    except KeyFileError as error:
        reason = f"{error.reason}; or remove {folder}: the next start makes new keys"
        raise KeyFileError(error.path, reason) from error


def _exposure(folder: Path) -> str:
    """Return how other users could open a folder; empty if none can."""
    try:
        found = folder.stat()
    except OSError as error:
        return f"{folder} cannot be examined: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if found.st_uid != os.geteuid():
        return f"{folder} belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        verb = "write to" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else "open"
        return f"others can {verb} {folder} (mode {stat.S_IMODE(found.st_mode):o}); run `chmod 700 {folder}`"
    return ""


def _socket_folder(address: str) -> Path:
    """Return the folder of an ipc address. Abstract sockets (``ipc://@NAME``) count as sockets in /, open to all."""
    path = address.removeprefix("ipc://")
    return Path("/") if path.startswith("@") else Path(path).parent


def _is_ipc(address: str) -> bool:
    return address.startswith("ipc://")
