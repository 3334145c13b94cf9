"""The pure function at the heart of it all: a slice's bytes from (dataset, view, seed, epoch, start, count)."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import xxhash

from loader_service.data.augment import augment, centre, complete_view
from loader_service.data.draws import draw
from loader_service.data.order import records_at
from loader_service.data.records import Records, Values
from loader_service.spec import DRAWS, SampleLayout, Slice, SliceId, View

GOLDEN_SAMPLES = 16
_GOLDEN_SEED, _GOLDEN_EPOCH = 2012, 60
_GOLDEN_VIEWS = (View(), View.named("center"))


def slice_numbers(count: int, what: SliceId) -> npt.NDArray[np.int64]:
    """The record numbers of a slice's positions: (what.count,) int64.

    Args:
        count: the dataset's number of records.
        what: which positions, in which order.
    """
    if what.view.order == "shuffled":
        return records_at(count, what.seed, what.epoch, what.start, what.count)
    if not 0 <= what.start <= what.start + what.count <= count:
        raise ValueError(f"positions {what.start} to {what.start + what.count} are not within an epoch of {count}")
    return np.arange(what.start, what.start + what.count, dtype=np.int64)


def fill(out: Slice, records: Records, what: SliceId, at: npt.NDArray[np.int64] | None = None) -> None:
    """Write a slice.

    Args:
        out: where to; its dtype decides between pixels (uint8) and pixels minus the mean's window (float32).
        records: the dataset.
        what: which slice, its view complete (see :func:`complete_view`).
        at: (1,) int64; holds the record being worked on, so that a death names its record.

    Raises:
        RecordError: a record cannot be read or decoded; what was written so far is not a slice.
        ValueError: the slice is not within the epoch.
    """
    numbers = slice_numbers(len(records), what)
    draws = draw(what.view, what.seed, what.epoch, what.start, what.count)
    out.draws.view(np.uint8)[...] = draws.view(np.uint8)  # as bytes: NumPy's own copy would leave the padding as it was
    mean = records.statistics.mean_image if out.images.dtype == np.float32 else None
    with records.values() as values:
        for i, number in enumerate(numbers.tolist()):
            if at is not None:
                at[0] = number
            out.labels[i] = _fill_record(out.images[i], values, number, draws[i], mean)


def _fill_record(
    out: npt.NDArray[np.uint8] | npt.NDArray[np.float32],
    values: Values,
    number: int,
    draws: npt.NDArray[np.void] | np.void,
    mean: npt.NDArray[np.float32] | None,
) -> int:
    """Write all samples of one record (one, or ten for ten-crop) and return its label."""
    label, codec, _, payload = values.read(number)
    pixels = values.decode(number, payload, codec)
    targets = out if out.ndim == 4 else out[None]
    for target, drawn in zip(targets, np.atleast_1d(draws), strict=True):
        if mean is None:
            augment(target, pixels, drawn)
        else:
            sample = np.empty(target.shape, np.uint8)
            augment(sample, pixels, drawn)
            centre(target, sample, mean, drawn)
    return label


def empty_slice(layout: SampleLayout, count: int) -> Slice:
    """New arrays for a slice of ``count`` samples, for use outside of slots."""
    return Slice(
        images=np.empty((count, *layout.view.shape), layout.dtype),
        labels=np.empty(count, np.int64),
        draws=np.zeros((count, *layout.view.draws_shape), DRAWS),
    )


def golden(records: Records) -> str:
    """The hash of sixteen fixed samples of this dataset: what a node shows to prove that it makes the same bytes."""
    digest = xxhash.xxh3_128()
    count = min(GOLDEN_SAMPLES, len(records))
    for view in _GOLDEN_VIEWS:
        complete = complete_view(view, records.statistics)
        out = empty_slice(SampleLayout(complete, "uint8"), count)
        fill(out, records, SliceId(complete, _GOLDEN_SEED, _GOLDEN_EPOCH, 0, count))
        for array in (out.images, out.labels, *(out.draws[name] for name in ("y", "x", "flip", "shift"))):
            digest.update(array.tobytes())
        digest.update(struct.pack("<Q", count))
    return digest.hexdigest()
