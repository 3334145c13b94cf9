"""Names to addresses: a name with several addresses is several nodes, and is looked up again while the run goes on.

So ``docker compose up --scale loader=4`` or a headless Kubernetes service grows and shrinks the pool. The look-ups have
a thread of their own, because a resolver may take seconds to answer.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

log = logging.getLogger("loader_service.client")

INTERVAL_S: Final = 5.0
"""How soon a new node behind a name is found; look-ups of a name that is cached cost next to nothing."""


class Resolver:
    """Looks names up, once at the start and then every few seconds.

    Args:
        addresses: as the user gave them, tcp:// or ipc://.
        on_change: called from the resolver's thread with all addresses, whenever they are others than before.
        interval_s: between look-ups.
    """

    def __init__(
        self, addresses: tuple[str, ...], on_change: Callable[[frozenset[str]], None], interval_s: float | None = None
    ) -> None:
        self._names = tuple(address for address in addresses if _has_name(address))
        self._fixed = frozenset(addresses) - frozenset(self._names)
        self._on_change, self._interval_s = on_change, INTERVAL_S if interval_s is None else interval_s
        self._known: dict[str, frozenset[str]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self._names:
            self._thread = threading.Thread(target=self._run, name="loader-service-resolver", daemon=True)
            self._thread.start()
        else:
            on_change(self._fixed)

    def close(self) -> None:
        """Look up no more. A look-up that is under way ends by itself and changes nothing."""
        self._stop.set()

    def _run(self) -> None:
        last: frozenset[str] | None = None
        while not self._stop.is_set():
            for name in self._names:
                self._look_up(name)
            now = self._fixed.union(*self._known.values())
            if now != last and not self._stop.is_set():
                last = now
                self._on_change(now)
            self._stop.wait(self._interval_s)

    def _look_up(self, address: str) -> None:
        """A name that cannot be looked up keeps the addresses that it had: resolvers fail, nodes may still be there."""
        parts = urlsplit(address)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except OSError as error:
            if address not in self._known:
                log.warning(
                    "%s cannot be looked up yet (%s); trying again every %.0f s", address, error, self._interval_s
                )
                self._known[address] = frozenset()
            return
        hosts = {str(sockaddr[0]) for *_, sockaddr in found}
        self._known[address] = frozenset(f"tcp://{f'[{h}]' if ':' in h else h}:{parts.port}" for h in hosts)


def _has_name(address: str) -> bool:
    """Whether an address holds a name to be looked up, and not a number or a path."""
    if not address.startswith("tcp://"):
        return False
    try:
        ipaddress.ip_address(urlsplit(address).hostname or "")
    except ValueError:
        return True
    return False
