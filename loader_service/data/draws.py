"""The random numbers of the system: one table that assigns words of a counter-based generator to decisions.

The generator is Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), addressed by
counter and never by state. The key is ``(seed, epoch)`` itself, never a sum of the two: a sum would give (0, 1) and (1, 0)
the same numbers. The counter is ``(4 * position, 0, stream, 0)``. Its first word counts blocks of four words, so each
position owns WORDS_PER_POSITION = 16 words of each stream. (NumPy increments the counter before it makes a block: position
p owns the blocks with first counter words 4 p + 1 to 4 p + 4.)

====== =============== ======================================================
stream purpose         layout
====== =============== ======================================================
0      order           words 0, 1, ... of the whole stream; see ``order``
1      augmentation    16 words per position, the table below
2      substitution    16 words per position; see :func:`order.substitute`
====== =============== ======================================================

===== ==================== =============================================
word  decision             mapping
===== ==================== =============================================
0     crop row y           high 32 bits, scaled to 0 .. places - 1
1     crop column x        high 32 bits, scaled to 0 .. places - 1
2     flip                 the highest bit
3..5  jitter alpha 1..3    the highest 14 bits index the quantiles
6..15 unused               reserved: new draws do not move existing ones
===== ==================== =============================================

Words become values by integer arithmetic only, so every CPU, libm and NumPy build gives the same bytes.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.types import DRAWS, RECORD_SIDE_PX, View

STREAM_ORDER: Final = 0
STREAM_AUGMENT: Final = 1
STREAM_SUBSTITUTE: Final = 2

WORDS_PER_POSITION: Final = 16
_BLOCKS_PER_POSITION: Final = WORDS_PER_POSITION // 4

WORD_Y: Final = 0
WORD_X: Final = 1
WORD_FLIP: Final = 2
WORD_ALPHA: Final = slice(3, 6)

QUANTILE_BITS: Final = 14  # a table of 16,384 int64, 128 KiB
FIXED_POINT_BITS: Final = 16
"""Normals and the jitter matrix are integers in units of 2**-16; their products are in units of 2**-32."""
MAX_SHIFT: Final = 255
"""Largest colour shift: it saturates every pixel, so a larger one changes nothing."""

TEN_CROPS: Final = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
"""Order of a ten-crop sample's first five crops; the other five are their mirror images (paper section 4.1)."""


def raw_words(seed: int, epoch: int, stream: int, start: int, n: int) -> npt.NDArray[np.uint64]:
    """Return (n,) uint64 words of a stream; ``start`` counts blocks of four words, ``n`` counts words."""
    # The bit generator alone: NumPy keeps its words stable, but not the distributions of np.random.Generator.
    generator = np.random.Philox(key=_words(seed, epoch), counter=_words(start, 0, stream, 0))
    return generator.random_raw(n)


def position_words(seed: int, epoch: int, stream: int, start: int, n: int) -> npt.NDArray[np.uint64]:
    """Return the words that positions start .. start + n - 1 own in a stream: (n, 16) uint64."""
    # Positions are at most 2**60 (types.Position), so the block number fits into 64 bits.
    words = raw_words(seed, epoch, stream, _BLOCKS_PER_POSITION * start, WORDS_PER_POSITION * n)
    return words.reshape(n, WORDS_PER_POSITION)


def draw(view: View, seed: int, epoch: int, start: int, n: int, side: int = RECORD_SIDE_PX) -> npt.NDArray[np.void]:
    """Draw crop, flip and colour shift of positions start .. start + n - 1.

    Args:
        view: the complete view (see :func:`augment.complete_view`); all but ``train`` use no random numbers.
        seed: seed of the run, 0 .. 2**64 - 1.
        epoch: epoch, 0 .. 2**64 - 1.
        start: first position.
        n: number of positions.
        side: side of the records, in pixels.

    Returns:
        (n, *view.draws_shape) DRAWS.

    Raises:
        ValueError: the view does not fit such records; see :meth:`View.of_records`.
    """
    draws = np.zeros((n, *view.draws_shape), DRAWS)  # zeros: the padding between the fields is part of the bytes
    places = side - view.crop + 1  # positions of the crop along one axis
    if not 1 <= view.crop <= side or (view.kind == "whole" and places > 1):
        raise ValueError(f"a view {view.kind} of {view.crop} pixels does not fit records of {side}")
    if view.kind == "train":
        words = position_words(seed, epoch, STREAM_AUGMENT, start, n)
        # words: (n, 16). A view that does not flip or jitter leaves those words unused, so no other draw moves.
        # The fields are int16; sides are at most 1,024 pixels, so no value is cut.
        draws["y"] = scale(words[:, WORD_Y], places)
        draws["x"] = scale(words[:, WORD_X], places)
        if view.flip:
            draws["flip"] = words[:, WORD_FLIP] >> np.uint64(63)
        if view.jitter:
            draws["shift"] = round_shift(exact_shift(view, words[:, WORD_ALPHA]))
    elif view.kind == "center":
        draws["y"] = draws["x"] = (places - 1) // 2  # if side - crop is odd, the larger margin is below and right
    elif view.kind == "ten-crop":
        last, middle = places - 1, (places - 1) // 2
        draws["y"] = np.array([0, 0, last, last, middle] * 2, np.int16)  # (10,), for all n records; order of TEN_CROPS
        draws["x"] = np.array([0, last, 0, last, middle] * 2, np.int16)
        draws["flip"][:, 5:] = True  # the last five are the mirror images of the first
    return draws


def scale(words: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.int64]:
    """Map words to 0 .. n - 1, uniform to within n / 2**32 (Lemire's multiplication without rejection)."""
    # 32-bit times n: no overflow of 64 bits, because n is below 2**32.
    scaled: npt.NDArray[np.uint64] = ((words >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
    return scaled.astype(np.int64)


def exact_shift(view: View, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the colour shift before rounding: basis x alpha, alpha ~ N(0, jitter) (paper section 4.1).

    Args:
        view: the complete view, with its jitter basis.
        words: (n, 3) uint64, one word per alpha.

    Returns:
        (n, 3) int64, in units of 2**-32 grey levels, per channel R, G, B.
    """
    alpha = normal_quantiles()[words >> np.uint64(64 - QUANTILE_BITS)]  # (n, 3) int64, units of 2**-16
    # Exact: alpha is below 2**19 and the bounds of View keep the matrix below 2**36, so sums stay below 2**57.
    # NumPy multiplies integers without BLAS, and integer sums do not depend on their order.
    shift: npt.NDArray[np.int64] = alpha @ jitter_matrix(view).T
    return shift


def round_shift(shift: npt.NDArray[np.int64]) -> npt.NDArray[np.int16]:
    """Round (n, 3) int64 in units of 2**-32 to whole grey levels, half to even, and saturate at +-255: (n, 3) int16."""
    bits = 2 * FIXED_POINT_BITS
    # An arithmetic right shift rounds down, also for negative values; so the rest is never negative.
    whole, rest, half = shift >> bits, shift & ((1 << bits) - 1), 1 << (bits - 1)
    whole = whole + ((rest > half) | ((rest == half) & (whole & 1 == 1)))
    clipped: npt.NDArray[np.int64] = np.clip(whole, -MAX_SHIFT, MAX_SHIFT)
    return clipped.astype(np.int16)


def jitter_matrix(view: View) -> npt.NDArray[np.int64]:
    """Return jitter x basis in fixed point: (3, 3) int64, [channel, alpha], units of 2**-16 grey levels."""
    if not view.basis:
        raise ValueError("a view with jitter needs its basis filled in before it can be drawn")
    basis = np.array(view.basis, np.float64).reshape(3, 3)
    # Two IEEE multiplications and a rounding give the same result on every machine.
    return np.rint(basis * view.jitter * (1 << FIXED_POINT_BITS)).astype(np.int64)


@cache
def normal_quantiles() -> npt.NDArray[np.int64]:
    """Return the standard normal's quantiles at (i + 1/2) / 2**14, in units of 2**-16: (16384,) int64, antisymmetric.

    No value lies within 1e-6 units of a rounding boundary (a test checks it), so differences between libms change none.
    """
    n = 1 << QUANTILE_BITS
    normal, unit = NormalDist(), 1 << FIXED_POINT_BITS
    upper = [round(normal.inv_cdf((i + 0.5) / n) * unit) for i in range(n // 2, n)]
    # Mirror the upper half: the mean is then exactly zero, whatever inv_cdf does near 0.
    table = np.array([-q for q in reversed(upper)] + upper, np.int64)
    table.flags.writeable = False  # one cached array for all callers
    return table


def _words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, np.uint64)
