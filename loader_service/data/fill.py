"""The pure function behind every guarantee: a slice's bytes from (dataset, view, seed, epoch, start, count)."""

from __future__ import annotations

import time
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from loader_service.data.augment import augment_records
from loader_service.data.codecs import raw_value
from loader_service.data.draws import draw
from loader_service.data.kernel import Window
from loader_service.data.order import records_at, substitute
from loader_service.data.records import Records, Values
from loader_service.errors import RecordError
from loader_service.types import DRAWS, STAGES, SampleLayout, Slice, SliceId, StageSeconds


class Stage(IntEnum):
    """The stages of making a slice. Other processes read the numbers: they are indices into ``types.STAGES``."""

    READ = 0
    DECODE = 1
    AUGMENT = 2
    NONE = -1  # no index: a stopwatch adds up nothing for it


class Stopwatch:
    """A stopwatch that adds up the seconds spent in each stage; entering a stage leaves the previous one.

    It costs a fifth of a microsecond per change of stage: a few changes per slice of raw records, three per jpeg record.

    Args:
        shown: (1,) int64, set to the current stage or Stage.NONE; in shared memory, so that the node can report it.
    """

    __slots__ = ("_seconds", "_shown", "_since", "_stage")

    def __init__(self, shown: npt.NDArray[np.int64] | None = None) -> None:
        self._shown = np.empty(1, np.int64) if shown is None else shown
        self._seconds = [0.0] * len(STAGES)
        self._stage, self._since = Stage.NONE, 0.0
        self._shown[0] = Stage.NONE

    def enter(self, stage: Stage) -> None:
        """End the current stage and begin another; Stage.NONE only ends the current one."""
        now = time.perf_counter()
        if self._stage != Stage.NONE:
            self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
        self._shown[0] = stage  # one aligned 8-byte store: the node reads it without a lock

    def spent(self, stage: Stage) -> float:
        """Return the seconds in a stage since the last stop, without the stage that is still running."""
        return self._seconds[stage]

    def stop(self) -> StageSeconds:
        """End the current stage; return the seconds of each since the last stop, and reset them."""
        self.enter(Stage.NONE)
        seconds = StageSeconds(*self._seconds)
        self._seconds = [0.0] * len(STAGES)
        return seconds


def slice_numbers(count: int, what: SliceId) -> npt.NDArray[np.int64]:
    """Return the record numbers at a slice's positions: (what.count,) int64.

    Args:
        count: number of records in the dataset.
        what: the slice's identity: positions, seed, epoch and order.

    Raises:
        ValueError: the positions are not within the epoch.
    """
    if what.view.order == "shuffled":
        return records_at(count, what.seed, what.epoch, what.start, what.count)
    if not 0 <= what.start <= what.start + what.count <= count:
        raise ValueError(f"positions {what.start} to {what.start + what.count} are not within an epoch of {count}")
    return np.arange(what.start, what.start + what.count, dtype=np.int64)


def slice_sources(count: int, what: SliceId) -> npt.NDArray[np.int64]:
    """Return the records that a slice's pixels come from: (what.count,) int64.

    They are the positions' own records, except that excluded records are replaced (see :func:`order.substitute`).
    """
    numbers = slice_numbers(count, what)
    if not what.excluded:
        return numbers
    excluded = np.array(what.excluded, np.int64)  # (k,), ascending
    bad = np.flatnonzero(np.isin(numbers, excluded))
    if not bad.size:
        return numbers
    sources = numbers.copy()  # `numbers` may be a read-only view of the epoch's table
    for i in bad.tolist():
        sources[i] = substitute(count, what.seed, what.epoch, what.start + i, excluded)
    return sources


def fill(
    out: Slice,
    records: Records,
    what: SliceId,
    at: npt.NDArray[np.int64] | None = None,
    stopwatch: Stopwatch | None = None,
) -> None:
    """Write a slice.

    Args:
        out: the output arrays; their dtype selects pixels (uint8) or pixels minus the mean image (float16, float32).
        records: the dataset.
        what: identity of the slice, with a complete view (see :func:`augment.complete_view`).
        at: (1,) int64, set to the record being processed, so that the node can name it if this process dies.
        stopwatch: stopwatch of the stages; its last stage is left running.

    Raises:
        RecordError: a record cannot be read or decoded, or is damaged; the output is incomplete.
        ValueError: the slice is not within the epoch.
    """
    watch = stopwatch or Stopwatch()
    watch.enter(Stage.AUGMENT)  # order and draws count as augmentation
    numbers = slice_sources(len(records), what)  # (count,) int64
    draws = draw(what.view, what.seed, what.epoch, what.start, what.count, records.side)  # (count, *draws_shape)
    # Copy as bytes: assigning the structs would leave the old padding bytes in the slot. `draws` itself stays private:
    # the kernel checks it once, and a client could change the copy in shared memory afterwards.
    out.draws.view(np.uint8)[...] = draws.view(np.uint8)
    mean = records.mean_pair if out.images.dtype != np.uint8 else None  # computed once, for the first float slice
    watch.enter(Stage.READ)
    records.ahead.ask(numbers)
    watch.enter(Stage.AUGMENT)
    read_s = watch.spent(Stage.READ)  # asking must not count as reading, or read-ahead would keep itself on
    # The transaction must outlive the copy: values are views of LMDB's pages.
    with records.values() as values:
        if records.manifest.codec == "raw":  # no copy: the kernel crops straight from LMDB's pages into the slot
            watch.enter(Stage.READ)
            stored = values.stored(numbers, at)
            if unchecked := values.unchecked(numbers):
                watch.enter(Stage.DECODE)  # not READ, which turns read-ahead on when it takes long
                values.compare_once(numbers, stored, unchecked, at)
            watch.enter(Stage.AUGMENT)
            made = augment_records(out.images, stored, draws, out.labels, numbers, at, mean, record_side=records.side)
            if made < what.count:  # the kernel stops at a record that is not raw
                raise values.refusal(int(numbers[made]))
        else:
            _fill_decoded(out, values, records.side, draws, numbers, at, mean, watch)
    records.ahead.learn(what.count, watch.spent(Stage.READ) - read_s)
    # Records of version 0.1 have no seal. A label out of range would fail far away, in the trainer's loss.
    if (unknown := np.flatnonzero(out.labels >= len(records.manifest.class_names))).size:
        i = unknown[0]
        raise RecordError(records.path, int(numbers[i]), f"its label {out.labels[i]} is beyond the last class")


def _fill_decoded(
    out: Slice,
    values: Values,
    side: int,
    draws: npt.NDArray[np.void],
    numbers: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64] | None,
    mean: npt.NDArray[np.float32] | None,
    watch: Stopwatch,
) -> None:
    """Write the samples of ``jpeg`` or ``centered`` records: decode one record, augment it while it is in the cache, repeat.

    Only the window that the samples need is decoded from each record.
    """
    value = raw_value(side)  # one raw record, overwritten by each
    windows = _windows(draws, out.images.shape[-2])
    for i, number in enumerate(numbers.tolist()):
        if at is not None:
            at[0] = number
        watch.enter(Stage.READ)
        found = values.find(number)
        watch.enter(Stage.DECODE)
        values.unpack(number, found, value, windows[i])
        watch.enter(Stage.AUGMENT)
        one = slice(i, i + 1)  # arrays of length one, as views of the slice's arrays
        augment_records(
            out.images[one], [value.data], draws[one], out.labels[one], numbers[one], at, mean, record_side=side
        )


def _windows(draws: npt.NDArray[np.void], side: int) -> list[Window]:
    """Return for each record the smallest window that contains all of its crops; draws are (n,) or (n, samples)."""
    # atleast_2d() adds its axis in front, so transpose before and after: (n,) becomes (n, 1).
    tops, lefts = (np.atleast_2d(draws[axis].T).T.astype(np.int64) for axis in ("y", "x"))  # (n, samples)
    top, left = tops.min(axis=1), lefts.min(axis=1)
    height, width = tops.max(axis=1) - top + side, lefts.max(axis=1) - left + side
    return list(zip(top.tolist(), left.tolist(), height.tolist(), width.tolist(), strict=True))


def empty_slice(layout: SampleLayout, count: int) -> Slice:
    """Return new arrays for a slice of ``count`` samples, for use outside of shared-memory slots."""
    return Slice(
        images=np.empty((count, *layout.view.shape), layout.dtype),
        labels=np.empty(count, np.int64),
        draws=np.zeros((count, *layout.view.draws_shape), DRAWS),  # zeros: padding is part of the bytes, as in draw()
    )
