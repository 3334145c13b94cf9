"""Every random number of the system, and the one place that says who gets which.

All randomness is words of Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), read
by counter, never by state. For (seed, epoch) the key is ``(seed, epoch)`` itself, never a sum of the two. The counter is
``(4 * position, 0, stream, 0)``: the first word advances by itself, a block has four words, so each position owns
WORDS_PER_POSITION = 16 words of each stream. (NumPy steps the counter before it makes a block: position p owns the blocks
with first counter words 4 p + 1 to 4 p + 4.)

====== =============== ===================================================
stream what for        layout
====== =============== ===================================================
0      order           words 0, 1, ... of the whole stream; see ``order``
1      augmentation    16 words per position, the table below
2      substitution    16 words per position; see the rule for bad records
====== =============== ===================================================

===== ==================== ========================================
word  decides              how
===== ==================== ========================================
0     crop row y           high 32 bits, scaled to 0 .. places - 1
1     crop column x        likewise
2     flip                 the highest bit
3..5  jitter alpha 1..3    the highest 14 bits index the quantiles
6..15 nothing yet          kept, so that new draws move no old ones
===== ==================== ========================================

Words become values by integer arithmetic only, so that the same bytes come from any CPU, libm and NumPy build.
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

QUANTILE_BITS: Final = 14
FIXED_POINT_BITS: Final = 16
"""Normals and the jitter matrix are integers in units of 2**-16; their products in units of 2**-32."""
MAX_SHIFT: Final = 255
"""A larger colour shift saturates every pixel just the same."""

TEN_CROPS: Final = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
"""The order of a ten-crop sample's first five crops; the other five are their mirror images."""


def raw_words(seed: int, epoch: int, stream: int, start: int, n: int) -> npt.NDArray[np.uint64]:
    """Words of a stream. (n,) uint64; ``start`` counts blocks of four words, ``n`` words."""
    generator = np.random.Philox(key=_words(seed, epoch), counter=_words(start, 0, stream, 0))
    return generator.random_raw(n)


def position_words(seed: int, epoch: int, stream: int, start: int, n: int) -> npt.NDArray[np.uint64]:
    """The words that positions start .. start + n - 1 own in a stream: (n, 16) uint64."""
    words = raw_words(seed, epoch, stream, _BLOCKS_PER_POSITION * start, WORDS_PER_POSITION * n)
    return words.reshape(n, WORDS_PER_POSITION)


def draw(view: View, seed: int, epoch: int, start: int, n: int, side: int = RECORD_SIDE_PX) -> npt.NDArray[np.void]:
    """What chance, or the view, decides for positions start .. start + n - 1, of records of ``side`` pixels.

    Returns:
        (n, *view.draws_shape) DRAWS.

    Raises:
        ValueError: the view is not one of such records; see :meth:`View.of_records`.
    """
    draws = np.zeros((n, *view.draws_shape), DRAWS)
    places = side - view.crop + 1
    if not 1 <= view.crop <= side or (view.kind == "whole" and places > 1):
        raise ValueError(f"a view {view.kind} of {view.crop} pixels does not fit records of {side}")
    if view.kind == "train":
        words = position_words(seed, epoch, STREAM_AUGMENT, start, n)
        draws["y"] = scale(words[:, WORD_Y], places)
        draws["x"] = scale(words[:, WORD_X], places)
        if view.flip:
            draws["flip"] = words[:, WORD_FLIP] >> np.uint64(63)
        if view.jitter:
            draws["shift"] = round_shift(exact_shift(view, words[:, WORD_ALPHA]))
    elif view.kind == "center":
        draws["y"] = draws["x"] = (places - 1) // 2
    elif view.kind == "ten-crop":
        last, middle = places - 1, (places - 1) // 2
        draws["y"] = np.array([0, 0, last, last, middle] * 2, np.int16)
        draws["x"] = np.array([0, last, 0, last, middle] * 2, np.int16)
        draws["flip"][:, 5:] = True
    return draws


def scale(words: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.int64]:
    """Map words to 0 .. n - 1, evenly to within n / 2**32 (Lemire's multiplication without rejection)."""
    scaled: npt.NDArray[np.uint64] = ((words >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
    return scaled.astype(np.int64)


def exact_shift(view: View, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The colour shift before rounding: basis x alpha, alpha ~ N(0, jitter) (paper section 4.1).

    Args:
        view: with its basis filled in.
        words: (n, 3) uint64, one word per alpha.

    Returns:
        (n, 3) int64, in units of 2**-32 grey levels, per channel R, G, B.
    """
    alpha = normal_quantiles()[words >> np.uint64(64 - QUANTILE_BITS)]
    shift: npt.NDArray[np.int64] = alpha @ jitter_matrix(view).T
    return shift


def round_shift(shift: npt.NDArray[np.int64]) -> npt.NDArray[np.int16]:
    """Round units of 2**-32 to whole grey levels, half to even, and saturate at +-255."""
    bits = 2 * FIXED_POINT_BITS
    whole, rest, half = shift >> bits, shift & ((1 << bits) - 1), 1 << (bits - 1)
    whole = whole + ((rest > half) | ((rest == half) & (whole & 1 == 1)))
    clipped: npt.NDArray[np.int64] = np.clip(whole, -MAX_SHIFT, MAX_SHIFT)
    return clipped.astype(np.int16)


def jitter_matrix(view: View) -> npt.NDArray[np.int64]:
    """Jitter x basis in fixed point: (3, 3) int64, [channel, alpha], units of 2**-16 grey levels."""
    if not view.basis:
        raise ValueError("a view with jitter needs its basis filled in before it can be drawn")
    basis = np.array(view.basis, np.float64).reshape(3, 3)
    # Two IEEE multiplications and a rounding: exact on every machine.
    return np.rint(basis * view.jitter * (1 << FIXED_POINT_BITS)).astype(np.int64)


@cache
def normal_quantiles() -> npt.NDArray[np.int64]:
    """The standard normal's quantiles at (i + 1/2) / 2**14, in units of 2**-16: (16384,) int64, antisymmetric.

    No value lies within 1e-6 units of a rounding boundary (a test says so), hence no libm can change one.
    """
    n = 1 << QUANTILE_BITS
    normal, unit = NormalDist(), 1 << FIXED_POINT_BITS
    upper = [round(normal.inv_cdf((i + 0.5) / n) * unit) for i in range(n // 2, n)]
    table = np.array([-q for q in reversed(upper)] + upper, np.int64)
    table.flags.writeable = False
    return table


def _words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, np.uint64)
