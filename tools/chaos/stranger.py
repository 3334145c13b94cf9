"""A stranger: another user of this machine, without keys, who does what such a user can do to nodes and clients.

It starts as root and gives that up before it does anything else. As the other user it may not be able to read a single file
of the project or of Python, so it imports the standard library alone, at the start. Until its standard input ends it

- plants files of every kind in /dev/shm under names that the service uses for segments,
- tries to open each segment that is there, and
- connects to the nodes: with a request for a web page, with half a greeting, and as a ZeroMQ peer without keys that sends
  messages without end.

At the end it removes what it planted and prints one line of JSON: the number of files ``planted`` and of those that were
``kept`` until then, of segments ``denied`` and ``opened``, of ``connections`` and of those that nodes have ``closed``, and
the ``bytes`` that they took.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import sys
from pathlib import Path

SHARED = Path("/dev/shm")  # noqa: S108 - the place under test
CONNECTIONS = 12
"""Connections at a time, over all nodes. More would take the CPU from the clients, and prove nothing more."""

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"  # ZMTP 3.0 (RFC 23): a command of 25 bytes
PART = b"\x03" + (1 << 14).to_bytes(8, "big") + bytes(1 << 14)  # a long frame with the flag "more"
OPENINGS = (b"GET / HTTP/1.1\r\nHost: node\r\n\r\n", GREETING[:30], GREETING + READY)


def plant() -> list[Path]:
    """Plant an empty file, a named pipe, a link and a file that claims to be of 2**40 bytes; return their paths."""
    paths = [SHARED / f"loader-service-{secrets.token_hex(16)}" for _ in range(4)]
    paths[0].touch()
    os.mkfifo(paths[1])
    paths[2].symlink_to("/etc/hostname")
    with paths[3].open("wb") as file:
        file.truncate(1 << 40)
    return paths


def pry() -> tuple[int, int]:
    """Try to open the segments of other users; return how many were denied and how many opened."""
    denied = opened = 0
    for path in SHARED.glob("loader-service-*"):
        try:
            if path.lstat().st_uid != os.getuid():  # not this stranger's own, nor another's
                os.close(os.open(path, os.O_RDWR))
                opened += 1
        except PermissionError:
            denied += 1
        except FileNotFoundError:  # its client has left
            continue
    return denied, opened


class Flood:
    """Connections to nodes, each with one opening; those that a node closes are replaced."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._open: dict[socket.socket, bool] = {}  # connection -> whether it floods
        self.connections = self.closed = self.bytes = 0

    def turn(self) -> None:
        """Keep CONNECTIONS open, write what they take, and count those that were closed."""
        while len(self._open) < CONNECTIONS:
            opening = OPENINGS[self.connections % len(OPENINGS)]
            end = socket.socket()
            try:
                end.connect(("127.0.0.1", self._ports[self.connections // len(OPENINGS) % len(self._ports)]))
                end.sendall(opening)
            except OSError:  # a node that does not run, or has closed the connection at once
                end.close()
                self.connections += 1
                break
            end.setblocking(False)
            self._open[end] = opening is OPENINGS[-1]
            self.connections += 1
        readable, writable, _ = select.select(self._open, [s for s, floods in self._open.items() if floods], [], 0.05)
        for end in writable:
            with contextlib.suppress(OSError):
                self.bytes += end.send(PART)
        for end in readable:
            try:
                ended = not end.recv(1 << 12)
            except OSError:
                ended = True
            if ended:
                self.closed += 1
                del self._open[end]
                end.close()


def become(user: int) -> None:
    """Become another user for good, without any group of the present one."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    os.chdir("/")


def main() -> None:
    """Do all of it until standard input ends; the arguments are the user's id and the nodes' ports."""
    become(int(sys.argv[1]))
    planted = plant()
    flood = Flood([int(port) for port in sys.argv[2:]])
    denied = opened = kept = 0
    try:
        # The time-out is a stranger's own pace: it shall not starve two cores.
        while not select.select([sys.stdin], [], [], 0.01)[0]:
            flood.turn()
            more = pry()
            denied, opened = denied + more[0], opened + more[1]
    finally:
        for path in planted:
            kept += path.is_symlink() or path.exists()
            path.unlink(missing_ok=True)
    print(  # noqa: T201 - the parent reads it
        json.dumps(
            {
                "planted": len(planted),
                "kept": kept,
                "denied": denied,
                "opened": opened,
                "connections": flood.connections,
                "closed": flood.closed,
                "bytes": flood.bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
