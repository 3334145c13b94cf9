"""Waking a loop that waits in poll, from any thread, signal handler or finaliser."""

from __future__ import annotations

import os
import threading


class Waker:
    """An eventfd: poll :meth:`fileno`; :meth:`wake` makes it readable until :meth:`clear`."""

    def __init__(self) -> None:
        # Between looking at the descriptor and writing to it, it must not become another file's. Reentrant, because a
        # finaliser or signal handler may run within any of these methods.
        self._lock = threading.RLock()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._descriptor

    def wake(self) -> None:
        """Wake the loop; does nothing once closed. Safe to call from anywhere."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Make it unreadable again; before looking at what it was woken for, so that nothing is missed."""
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)
