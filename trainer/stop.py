"""Orderly shutdown on Ctrl-C and SIGTERM, between two training steps.

Rules of the file:

1. The first signal requests a stop. The loop notices it after the current step, saves a checkpoint and returns.
2. While the loop waits for data, inside ``interruptible``, the signal ends the wait at once.
3. A second signal reaches the previous handlers, so that a stuck process can still be killed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Raised to unwind on shutdown; not an error."""


class StopRequest:
    """A context in which the signals request a stop. Python allows signal handlers only in the main thread."""

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
        """Raise ``Stopped`` inside the block as soon as a signal arrives; the block must be safe to abandon anywhere."""
        self._waiting = True  # before the check, or a signal between the two lines would be lost
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raise ``Stopped`` if a signal has arrived."""
        if self.received is not None:
            raise Stopped

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()  # rule 3
        if self._waiting:
            raise Stopped

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
