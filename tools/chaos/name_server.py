"""A stand-in for a name server: a file with the addresses of the one name that exists.

A client that reaches its nodes by a name asks this file instead of the system's resolver (:func:`answer_from`), so names
can fail and change on any machine without privileges. The client's own code does everything after the look-up.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

NAME: Final = "nodes.chaos.test"


class NameServer:
    """The addresses behind the name, as the process that injects faults controls them.

    Args:
        path: file that clients read.

    Fields:
        hidden: addresses of nodes that the name leaves out for now.
        failing: whether look-ups fail for now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.hidden: set[str] = set()
        self._known: set[str] = set()
        self.failing = False
        self._publish()  # the file exists before any client looks it up

    def add(self, host: str) -> None:
        """Add the address of a new node."""
        self._known.add(host)
        self._publish()

    def hide(self, host: str) -> None:
        """Leave an address out of the answers, although its node runs."""
        self.hidden.add(host)
        self._publish()

    def reveal(self, host: str) -> None:
        """Put a hidden address back."""
        self.hidden.discard(host)
        self._publish()

    def fail(self) -> None:
        """Fail every look-up."""
        self.failing = True
        self._publish()

    def recover(self) -> None:
        """Answer look-ups again."""
        self.failing = False
        self._publish()

    @property
    def asked(self) -> int:
        """Time of the last look-up by any client, in nanoseconds of the file system's clock; 0 before the first."""
        asked = _asked(self._path)
        return asked.stat().st_mtime_ns if asked.exists() else 0

    def _publish(self) -> None:
        # Renamed into place: a client never reads half a file.
        fresh = self._path.with_suffix(".new")
        # An empty file: every look-up fails.
        fresh.write_text("" if self.failing else "\n".join(sorted(self._known - self.hidden)))
        fresh.rename(self._path)


def _asked(path: Path) -> Path:
    """Return the empty file that each look-up touches."""
    return path.with_suffix(".asked")


def answer_from(path: Path) -> None:
    """Resolve :data:`NAME` from the file in this process from now on; other names go to the system's resolver."""
    system = socket.getaddrinfo  # the real one, bound before it is replaced

    def look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME:
            return system(host, *rest, **options)
        _asked(path).touch()
        hosts = path.read_text().split()
        if not hosts:
            # EAI_AGAIN is the temporary failure of a server that cannot be reached, unlike a name that does not exist.
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer")
        return [entry for host in hosts for entry in system(host, *rest, **options)]

    socket.getaddrinfo = look_up  # the resolver looks this attribute up at each call
