"""The way of finished batches to the caller's thread, and of their slots back.

A signal's handler may raise an exception in the caller's thread between any two instructions, and whatever that exception
leaves undone must be found again. So every change here that the caller's thread makes is a single call of a function in C,
which happens as a whole or not at all. A slot comes back by the callback of a weak reference, which is such a function, too.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_service.client.protocol import PendingBatch
from loader_service.errors import LoaderServiceError


class Bell:
    """A signal from one thread to another that is kept until it is heard. Any thread may ring, a finaliser, too.

    It is a lock, locked while there is nothing new: the one primitive whose wait and whose wake-up are a single call each.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Let the next or the present wait end."""
        with suppress(RuntimeError):  # it has been rung already
            self._lock.release()

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait until it is rung; return False after ``timeout_s``. -1 waits without limit."""
        return self._lock.acquire(timeout=timeout_s)


class Deliveries:
    """The finished batches of one run, in order, from the session's thread to the caller's.

    A batch stays the first until the caller drops it: a caller that is interrupted finds it again.
    """

    def __init__(self) -> None:
        self._batches: deque[PendingBatch] = deque()
        self._error: LoaderServiceError | None = None
        self._bell = Bell()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PendingBatch]:
        return iter(self._batches.copy())

    def put(self, batch: PendingBatch) -> None:
        """Add a batch."""
        self._batches.append(batch)
        self._bell.ring()

    def end(self, error: LoaderServiceError) -> None:
        """Add the error that ends the run; the first one counts."""
        self._error = self._error or error
        self._bell.ring()

    def first(self) -> PendingBatch | None:
        """Return the first batch, which stays here; None if there is none yet.

        Raises:
            LoaderServiceError: the one that ended the run, after its last batch.
        """
        if self._batches:  # only the caller's thread removes some
            return self._batches[0]
        if self._error:
            self._bell.ring()  # for other threads that wait
            raise self._error
        return None

    def wait(self, timeout_s: float) -> bool:
        """Wait until something may have come; return False after ``timeout_s``. -1 waits without limit."""
        return self._bell.wait(timeout_s)

    def drop(self, batch: PendingBatch) -> None:
        """Remove a batch if it is the first."""
        if self.is_first(batch):
            self._batches.popleft()

    def is_first(self, batch: PendingBatch | None) -> bool:
        """Return True if this batch is here, and the first."""
        return bool(self._batches) and self._batches[0] is batch


class Hold:
    """The object that all arrays over one slot keep alive: the slot is free when it is collected.

    ``np.asarray(hold)`` and every view of that array keep it.
    """

    __slots__ = ("__array_interface__", "__weakref__", "_array")

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array  # keeps the mapping alive
        # NumPy makes an object with this attribute the base of the array.
        self.__array_interface__ = array.__array_interface__


class Claim(weakref.ref[Hold]):
    """A weak reference to the hold on a slot."""

    __slots__ = ("slot",)
    slot: int


class Holds:
    """The slots whose arrays the caller has.

    A claim counts from :meth:`keep` on. One that was made and never kept, by a caller that was interrupted, changes nothing
    when its arrays are collected, however late.
    """

    def __init__(self) -> None:
        self._claims: dict[int, Claim] = {}
        self._gone: deque[Claim] = deque()
        # Typed for any reference, as the callback of a reference is.
        self._collected: Callable[[Any], None] = self._gone.append

    def claim(self, hold: Hold, slot: int) -> Claim:
        """Return a claim to a slot."""
        claim = Claim(hold, self._collected)
        claim.slot = slot
        return claim

    def keep(self, claim: Claim) -> None:
        """Leave a slot to the caller until its hold is collected."""
        self._claims[claim.slot] = claim

    def take_back(self) -> Iterator[int]:
        """Yield the slots whose holds are gone. For the session's thread."""
        while self._gone:
            claim = self._gone.popleft()
            if self._claims.get(claim.slot) is claim:  # else it was never kept
                del self._claims[claim.slot]
                yield claim.slot

    def __contains__(self, slot: int) -> bool:
        return slot in self._claims

    def __len__(self) -> int:
        """Return the number of slots that arrays of the caller hold now."""
        return sum(claim() is not None for claim in tuple(self._claims.values()))

    @property
    def changed(self) -> bool:
        """True if slots can be taken back."""
        return bool(self._gone)
