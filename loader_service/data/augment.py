"""Augmentation: crop, flip, colour shift and mean subtraction, from the pixels of a record to those of a sample.

The NumPy form in this file defines the bytes. The compiled forms (see ``kernel``) make the same bytes; tests compare them.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service.data import kernel
from loader_service.data.codecs import CODECS, HEADER, Pixels, raw_bytes
from loader_service.data.draws import MAX_SHIFT
from loader_service.data.manifest import Statistics
from loader_service.types import RECORD_SIDE_PX, Images, View


def complete_view(view: View, statistics: Statistics) -> View:
    """Return a view with the fields filled in that depend on the dataset: the side of ``whole`` and the jitter's basis.

    The basis is eigenvector times eigenvalue, in grey levels (paper section 4.1). The paper's formula makes sense for
    values in 0..1, where ImageNet's eigenvalues are .2281, .0212 and .0060. Scaled by 255 to grey levels, the standard
    deviation along the first axis is about 5.8.

    Raises:
        ValueError: the crop is larger than the records.
    """
    view = view.of_records(statistics.side)
    # A given basis stays: it is part of the view, and so of the identity of every slice.
    if view.kind != "train" or not view.jitter or view.basis:
        return view
    basis = 255.0 * statistics.eigenvectors * statistics.eigenvalues  # (3, 3): column k times value k
    return msgspec.structs.replace(view, basis=tuple(basis.ravel().tolist()))


def augment_records(
    images: Images,
    values: list[memoryview],
    draws: npt.NDArray[np.void],
    labels: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64] | None = None,
    mean: npt.NDArray[np.float32] | None = None,
    *,
    record_side: int = RECORD_SIDE_PX,
    form: str | None = None,
) -> int:
    """Write the samples and labels of raw records; stop at the first record that is not raw. All arrays are C-contiguous.

    Args:
        images: output, (n, side, side, 3) or (n, samples, side, side, 3); uint8 without ``mean``, else float16 or float32.
        values: the n stored records, header and payload.
        draws: (n,) or (n, samples) DRAWS that fit the crop, in memory that no other process writes.
        labels: output, (n,) int64.
        numbers: (n,) int64, the record numbers.
        at: (1,) int64, set to the number of each record before its first byte is read.
        mean: (2, record_side, record_side, 3) float32, the mean image and its mirror image (see :attr:`Records.mean_pair`).
        record_side: side of the records, in pixels.
        form: one of :data:`kernel.FORMS`; the chosen one if None.

    Returns:
        Number of records written; less than n if the next record is not raw.

    Raises:
        ValueError: an array has another size, or a draw does not fit the record; nothing was written.
    """
    form = form or kernel.chosen()
    if form != "numpy":
        assert kernel.compiled is not None
        # It makes the same checks, then one loop over the whole slice without the GIL.
        return kernel.compiled.augment(form, images, values, draws, labels, numbers, at, mean, record_side)
    # Before the first write, as in the compiled forms: an error leaves the output untouched.
    check_draws(draws, images.shape[-2], record_side)
    size, shape = raw_bytes(record_side), (record_side, record_side, 3)
    for i, value in enumerate(values):
        if at is not None:
            at[0] = numbers[i]  # before the first read: a page that the disk cannot read kills the process
        # Byte 4 of HEADER is the codec. The exact length keeps frombuffer() within the value.
        if len(value) != HEADER.size + size or value[4] != CODECS["raw"]:
            return i
        labels[i] = HEADER.unpack_from(value)[0]
        pixels = np.frombuffer(value, np.uint8, size, HEADER.size).reshape(shape)
        targets = images[i] if images.ndim == 5 else images[i : i + 1]  # (samples, side, side, 3)
        for target, drawn in zip(targets, np.atleast_1d(draws[i]), strict=True):
            if mean is None:
                augment(target, pixels, drawn)
            else:
                # The shift saturates in uint8 whatever the output is: float pixels are uint8 pixels minus the mean.
                sample = np.empty(target.shape, np.uint8)
                augment(sample, pixels, drawn)
                centre(target, sample, mean[0], drawn)  # mean[1], the mirror image, is for the compiled forms
    return len(values)


def check_draws(draws: npt.NDArray[np.void], side: int, record_side: int) -> None:
    """Raise ValueError for the first draw that does not fit a crop of ``side`` pixels in records of ``record_side``."""
    last = record_side - side
    y, x, shift = draws["y"], draws["x"], draws["shift"]
    # y and x are (n,) or (n, samples); shift has the channel as one more axis.
    wrong = (y < 0) | (y > last) | (x < 0) | (x > last) | ((shift < -MAX_SHIFT) | (shift > MAX_SHIFT)).any(axis=-1)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"draw {i} ({draws.ravel()[i]}) does not fit a crop of {side} in {record_side}")


def augment(out: Pixels, pixels: Pixels, draw: npt.NDArray[np.void] | np.void) -> None:
    """Write one sample: crop, flip, then add the colour shift with saturation.

    Args:
        out: output, (side, side, 3) uint8, C-contiguous.
        pixels: (record side, record side, 3) uint8, the record's pixels, C-contiguous.
        draw: one DRAWS, the sample's crop position, flip and colour shift.
    """
    side = out.shape[0]
    y, x = int(draw["y"]), int(draw["x"])
    flat = out.reshape(side, side * 3)  # (side, side * 3): NumPy's inner loops then run over whole rows
    if draw["flip"]:
        out[...] = pixels[y : y + side, x : x + side][:, ::-1]
        source = flat  # the shift then works in place
    else:
        # A view of the record: the shift below writes straight into `out`.
        source = pixels.reshape(pixels.shape[0], -1)[y : y + side, 3 * x : 3 * (x + side)]
    shift = draw["shift"]
    if not shift.any():
        if source is not flat:  # a flipped sample is already in place
            flat[...] = source
        return
    # Saturating addition without leaving uint8: lower the pixels that would overflow, then add; likewise downwards.
    # One shift has one sign per channel, so one of the two steps changes nothing. Shapes: (side * 3,).
    up = np.tile(np.maximum(shift, 0).astype(np.uint8), side)
    down = np.tile(np.maximum(-shift, 0).astype(np.uint8), side)
    np.minimum(source, 255 - up, out=flat)
    flat += up
    np.maximum(flat, down, out=flat)
    flat -= down


def centre(
    out: npt.NDArray[np.float16] | npt.NDArray[np.float32],
    sample: Pixels,
    mean_image: npt.NDArray[np.float32],
    draw: npt.NDArray[np.void] | np.void,
) -> None:
    """Subtract the mean image from a finished sample, with the sample's crop window and flip.

    Args:
        out: output, (side, side, 3) float32, or float16 rounded to nearest from float32.
        sample: (side, side, 3) uint8, already cropped, flipped and shifted.
        mean_image: (record side, record side, 3) float32.
        draw: one DRAWS, the sample's own.
    """
    side = sample.shape[0]
    y, x = int(draw["y"]), int(draw["x"])
    window = mean_image[y : y + side, x : x + side]
    # Subtract in float32 whatever the output is: a float16 is rounded from that difference.
    np.subtract(sample, window[:, ::-1] if draw["flip"] else window, out=out, dtype=np.float32, casting="same_kind")
