"""Ctrl-C and SIGTERM, turned into an orderly end between two steps.

Rules of the file:

1. The first signal asks for an end. The loop sees it after the step under way, saves a checkpoint and leaves.
2. While the loop waits for data, inside ``interruptible``, the signal ends the waiting at once.
3. The second signal meets the handlers that were there before, so that a stuck process can still be ended.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Training was asked to end: no error, but the way out of whatever is going on."""


class StopRequest:
    """Listens for the signals while used as a context; only in the main thread, as Python asks."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that leaves nothing half done if a signal ends it with ``Stopped``."""
        self._waiting = True  # before the check: a signal between the two must not be lost
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raise ``Stopped`` if a signal has come."""
        if self.received is not None:
            raise Stopped

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._waiting:
            raise Stopped

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
