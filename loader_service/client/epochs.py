"""Loops over epochs: one ``for`` is one epoch, and nothing is lost where a loop is interrupted.

:class:`Epochs` is the part that Loader and TensorLoader have in common. The next batch is **offered** first: made, and put
in a dict under a number. Then it is **taken**: ``dict.pop`` moves it from there to the caller. The iterators are ``map``
objects over ``dict.pop``, so no bytecode runs between the two, and no signal's handler. If an exception comes earlier, the
batch is still on offer, and the next call gives it. All else is derived from the question whether the offer was taken.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from loader_service.client.plan import Place, Plan, Schedule
from loader_service.errors import IteratorReplaced, LoaderBusy, NoEpochLeft, OptionError

Item = TypeVar("Item")
Source = TypeVar("Source")
Lane = TypeVar("Lane")

MAX_EPOCH = 2**31


@dataclass(frozen=True)
class Counts:
    """One epoch's positions: returned, filled with another record's pixels, and left out."""

    delivered: int = 0
    substituted: int = 0
    left_out: int = 0


_NOTHING = Counts()


@dataclass(frozen=True)
class Books:
    """The place of a loader, and what it has returned.

    Fields:
        place: the first position that has not been returned.
        origin: the place at which the loader started, or was last set.
        excluded: records that were known to be bad at ``origin``.
        epochs: the counts of each epoch of which a batch was returned.
        batches, samples: returned so far.
    """

    place: Place
    origin: Place
    excluded: tuple[int, ...] = ()
    epochs: Mapping[int, Counts] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0

    @property
    def has_begun(self) -> bool:
        """True if a batch of the epoch at ``place`` was returned since ``origin``."""
        return self.place.position > 0 and self.place != self.origin

    def returned(self, plan: Plan, place: Place, substituted: int) -> Books:
        """Return the books after a batch, which leads to ``place``."""
        # An epoch that is looped over again is counted anew.
        old = self.epochs.get(plan.epoch, _NOTHING) if self.has_begun and plan.epoch == self.place.epoch else _NOTHING
        now = Counts(old.delivered + plan.count, old.substituted + substituted, old.left_out)
        epochs = {**self.epochs, plan.epoch: now}
        return Books(place, self.origin, self.excluded, epochs, self.batches + 1, self.samples + plan.count)

    def moved(self, place: Place, excluded: tuple[int, ...], left_out: int) -> Books:
        """Return the books at another place; ``left_out`` is the number of positions that the epoch begun still had."""
        epochs = self.epochs
        if self.has_begun and left_out:
            now = epochs.get(self.place.epoch, Counts())
            epochs = {**epochs, self.place.epoch: replace(now, left_out=left_out)}
        return replace(self, place=place, origin=place, excluded=excluded, epochs=epochs)


@dataclass(eq=False)
class Turn:
    """One iterator: over one epoch, or over all that are left if ``epoch`` is None."""

    epoch: int | None
    ended: bool = False


@dataclass(frozen=True, eq=False)
class Step(Generic[Source, Lane]):
    """One batch's way to the caller, as one value, so that one assignment makes a step.

    Fields:
        before, after: the books until the batch is taken, and from then on.
        key: the offer's number.
        source: the batch before it was made into what the caller gets; None at the start of a lane.
        lane: the queue that batches come from; None if the place was set and no run has begun there.
    """

    before: Books
    after: Books
    key: int = 0  # no offer has it
    source: Source | None = None
    lane: Lane | None = None


class Epochs(ABC, Generic[Item, Source, Lane]):
    """A source of items, epoch by epoch.

    Args:
        schedule: the batches of each epoch.
        books: the place to start at.
    """

    def __init__(self, schedule: Schedule, books: Books) -> None:
        self._schedule = schedule
        self._offers: dict[int, Item] = {}  # one offer at most; it is taken when its number is gone
        self._step: Step[Source, Lane] = Step(books, books)
        self._turn: Turn | None = None
        self._user: dict[str, int] = {}  # the thread that is inside of next()

    def __len__(self) -> int:
        """Return the number of batches in one whole epoch, for this rank; after a resume, too."""
        return self._schedule.batches_left(0)

    def __iter__(self) -> Iterator[Item]:
        """Return an iterator over one epoch: the first time the first one, or the rest of the one that was resumed.

        If the loop before was left early, its epoch's other positions are left out (``EpochAccount.left_out``), and this is the
        next epoch. An epoch of which no batch was returned has not begun, and is not left out.

        Raises:
            NoEpochLeft: all ``epochs`` have begun.
        """
        self._check()
        books = self._books
        place = self._upcoming(books)
        if self._schedule.is_over(place):
            raise NoEpochLeft(self._schedule.epochs or 0)
        if place != self._schedule.settled(books.place):
            self._move(place)
        return self._iterate(Turn(place.epoch))

    def all_epochs(self) -> Iterator[Item]:
        """Return an iterator over everything that is left, in one stream; it begins with the first batch not yet returned."""
        self._check()
        return self._iterate(Turn(None))

    @property
    def epoch(self) -> int:
        """The epoch of the newest loop until it ends, then that of the next loop; in ``all_epochs()``, of the next batch."""
        turn, books = self._turn, self._books
        if turn is None or turn.ended:
            return self._upcoming(books).epoch
        return self._schedule.settled(books.place).epoch if turn.epoch is None else turn.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop be that of ``epoch``, from its start.

        If that is the next one anyway, or the rest of it after a resume, nothing changes, and prefetched batches stay.
        Otherwise they are dropped. Call it between loops; a loop in progress gets IteratorReplaced if the place changes.

        Raises:
            OptionError: it is no epoch's number.
        """
        self._check()
        if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < MAX_EPOCH:
            raise OptionError("epoch", epoch, f"a whole number from 0 to {MAX_EPOCH - 1}")
        if epoch != self._upcoming(self._books).epoch:
            self._turn = None
            self._move(Place(epoch, 0))

    # For subclasses

    @abstractmethod
    def _check(self) -> None:
        """Raise an error unless this process may take batches."""

    @abstractmethod
    def _begin(self, books: Books) -> Lane:
        """Begin to make batches from a place on."""

    @abstractmethod
    def _fetch(self, lane: Lane) -> tuple[Source, Item, Books]:
        """Wait for the next batch, which stays in its lane; return it, what the caller gets, and the books after it.

        Until then, ``self._step.after`` has the books before it.
        """

    @abstractmethod
    def _drop(self, lane: Lane, source: Source) -> None:
        """Remove a batch that was taken from its lane, if it is still there."""

    @abstractmethod
    def _hand_over(self, step: Step[Source, Lane]) -> None:
        """Do what remains to do when an offer is complete. It may be called again for the same offer."""

    @abstractmethod
    def _excluded_now(self) -> tuple[int, ...]:
        """Return the records that are known to be bad."""

    @property
    def _books(self) -> Books:
        step = self._step
        return step.before if step.key in self._offers else step.after

    def _set(self, books: Books) -> None:
        """Continue at another place, with another run."""
        self._step = Step(books, books)  # an offer that was not taken is now none: it is dropped when the run begins

    # Inside

    def _move(self, place: Place) -> None:
        books = self._books
        left_out = self._schedule.expected(books.place.position)
        self._set(books.moved(place, self._excluded_now(), left_out))

    def _upcoming(self, books: Books) -> Place:
        """Return the place at which the next loop begins."""
        place = self._schedule.settled(books.place)
        return Place(place.epoch + 1, 0) if place == books.place and books.has_begun else place

    def _iterate(self, turn: Turn) -> Iterator[Item]:
        self._turn = turn
        return map(self._offers.pop, _Numbers(self, turn))

    def _offer(self, turn: Turn) -> int:
        """Offer the next batch and return its number, with which the iterator takes it.

        Raises:
            StopIteration: the turn is over.
            LoopError: there can be no next batch for this iterator, in this thread or in this process.
        """
        me = threading.get_ident()
        try:
            if self._user.setdefault("thread", me) != me:
                raise LoaderBusy
            return self._make_step(turn).key
        finally:
            # If an interrupt keeps this from happening, the mark is this thread's, which may go on.
            if self._user.get("thread") == me:
                self._user.clear()

    def _make_step(self, turn: Turn) -> Step[Source, Lane]:
        if turn.ended:
            raise StopIteration
        self._check()
        if turn is not self._turn:
            raise IteratorReplaced
        step = self._step
        if step.key not in self._offers:
            step = self._next_step(step, turn)
        self._hand_over(step)
        return step

    def _next_step(self, step: Step[Source, Lane], turn: Turn) -> Step[Source, Lane]:
        books, lane = step.after, step.lane
        if lane is not None and step.source is not None:
            self._drop(lane, step.source)
        place = self._schedule.settled(books.place)
        if self._schedule.is_over(place) or (turn.epoch is not None and place.epoch > turn.epoch):
            turn.ended = True
            raise StopIteration
        if lane is None:
            self._offers.clear()  # an offer of the place before that was never taken
            lane = self._begin(books)
            step = self._step = Step(books, books, lane=lane)
        source, item, after = self._fetch(lane)
        key = step.key + 1
        self._offers[key] = (
            item  # first: an interrupt before the next line leaves an offer that the next attempt replaces
        )
        self._step = Step(books, after, key, source, lane)
        return self._step


class _Numbers(Generic[Item, Source, Lane]):
    """An iterator over the numbers of offers."""

    def __init__(self, epochs: Epochs[Item, Source, Lane], turn: Turn) -> None:
        self._epochs, self._turn = epochs, turn

    def __iter__(self) -> _Numbers[Item, Source, Lane]:
        return self

    def __next__(self) -> int:
        return self._epochs._offer(self._turn)
