"""A name server's stand-in: a file with the addresses of the one name that there is.

A client that reaches its nodes by a name asks it instead of the system's resolver (:func:`answer_from`), so that names
can fail and change on any machine, without privileges. Everything behind the looking up is the client's own.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

NAME: Final = "nodes.chaos.test"


class Names:
    """What the name stands for, as the name server tells it; for the process that injects faults.

    Args:
        path: the file.

    Fields:
        hidden: addresses of nodes that the name leaves out for now.
        failing: whether nobody answers for now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.hidden: set[str] = set()
        self._known: set[str] = set()
        self.failing = False
        self._publish()

    def add(self, host: str) -> None:
        """There is a node at one more address."""
        self._known.add(host)
        self._publish()

    def hide(self, host: str) -> None:
        """Leave an address out, though its node is there."""
        self.hidden.add(host)
        self._publish()

    def reveal(self, host: str) -> None:
        """Name it again."""
        self.hidden.discard(host)
        self._publish()

    def fail(self) -> None:
        """Answer nothing."""
        self.failing = True
        self._publish()

    def recover(self) -> None:
        """Answer again."""
        self.failing = False
        self._publish()

    def _publish(self) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text("" if self.failing else "\n".join(sorted(self._known - self.hidden)))
        beside.rename(self._path)


def answer_from(path: Path) -> None:
    """Look :data:`NAME` up in the file from now on, in this process; every other name goes to the system's resolver."""
    system = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME:
            return system(host, *rest, **options)
        hosts = path.read_text().split()
        if not hosts:
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer")
        return [entry for host in hosts for entry in system(host, *rest, **options)]

    socket.getaddrinfo = look_up
