"""The resolver of node names: a name with several addresses stands for several nodes, and is looked up repeatedly.

So ``docker compose up --scale loader=4`` or a headless Kubernetes service adds and removes nodes during a run. A separate
thread makes the look-ups, because a resolver may take seconds to answer.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from loader_service.client.delivery import Bell

log = logging.getLogger("loader_service.client")

INTERVAL_S: Final = 5.0
"""Seconds between look-ups, after which a new node behind a name is found. A cached look-up costs almost nothing."""


class Resolver:
    """A thread that looks names up at the start and then every few seconds. Without names :meth:`start` starts none.

    Args:
        addresses: the addresses that the user gave, tcp:// or ipc://.
        on_change: called with all addresses when they change, from the resolver's thread; without names, by :meth:`start`.
        interval_s: seconds between look-ups; None for the default.
    """

    def __init__(
        self, addresses: tuple[str, ...], on_change: Callable[[frozenset[str]], None], interval_s: float | None = None
    ) -> None:
        self._names = tuple(address for address in addresses if _has_name(address))
        self._fixed = frozenset(addresses) - frozenset(self._names)
        self._on_change, self._interval_s = on_change, INTERVAL_S if interval_s is None else interval_s
        self._known: dict[str, frozenset[str]] = {}
        self._stopped = False
        # Not an Event: close() may come from a finaliser that runs inside the thread's own wait, where an Event holds a lock.
        self._closing = Bell()

    def start(self) -> None:
        """Begin to look up."""
        if self._names:
            # Daemon: getaddrinfo cannot be interrupted at exit.
            threading.Thread(target=self._run, name="loader-service-resolver", daemon=True).start()
        else:
            self._on_change(self._fixed)  # in the caller's thread; the addresses never change

    def close(self) -> None:
        """Stop looking up. A look-up that is in progress ends by itself and changes nothing. Safe to call from anywhere."""
        self._stopped = True
        self._closing.ring()  # without joining: the thread may be inside getaddrinfo for seconds

    def _run(self) -> None:
        last: frozenset[str] | None = None
        while not self._stopped:
            for name in self._names:
                self._look_up(name)
            now = self._fixed.union(*self._known.values())
            if now != last and not self._stopped:  # a look-up may take seconds, and close() may come meanwhile
                last = now
                self._on_change(now)
            self._closing.wait(self._interval_s)

    def _look_up(self, address: str) -> None:
        """Look one name up; keep its last addresses if that fails, since the nodes may still be there."""
        parts = urlsplit(address)
        try:
            # SOCK_STREAM: else each address comes once per socket type.
            found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except OSError as error:
            if address not in self._known:
                log.warning("cannot look up %s yet (%s); trying again every %.0f s", address, error, self._interval_s)
                self._known[address] = frozenset()  # so that the warning comes once
            return
        hosts = {str(sockaddr[0]) for *_, sockaddr in found}
        self._known[address] = frozenset(
            f"tcp://{f'[{h}]' if ':' in h else h}:{parts.port}" for h in hosts
        )  # IPv6 in brackets


def _has_name(address: str) -> bool:
    """Return True if an address holds a host name, rather than an IP address or a path."""
    if not address.startswith("tcp://"):
        return False
    try:
        ipaddress.ip_address(urlsplit(address).hostname or "")
    except ValueError:
        return True
    return False
