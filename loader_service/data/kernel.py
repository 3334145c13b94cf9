"""Which form of the inner loops this process runs: compiled for its CPU, or plain NumPy.

====== ==========================================================================================
form   where
====== ==========================================================================================
avx512 x86-64 with AVX-512 VBMI (Ice Lake, Zen 4 and later)
avx2   x86-64 with AVX2
neon   arm64
c      anywhere the extension was compiled
numpy  everywhere; what the bytes are by definition, and what serves where no compiler was at hand
====== ==========================================================================================

The vector forms of x86-64 also decode JPEGs themselves, no more of them than a crop needs; with the others libjpeg-turbo
decodes whole ones. All forms make the same bytes. The environment variable LOADER_SERVICE_KERNEL names another form than
the best.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.errors import OptionError

try:
    from loader_service.data import _kernel
except ImportError:  # built without a compiler: the extension is optional
    _kernel = None  # type: ignore[assignment]

try:
    from loader_service.data import _jpeg
except ImportError:
    _jpeg = None  # type: ignore[assignment]

compiled: Final = _kernel
"""The extension; None where there is none, and then "numpy" is the only form."""

VARIABLE: Final = "LOADER_SERVICE_KERNEL"

FORMS: Final[tuple[str, ...]] = (*(compiled.forms() if compiled else ()), "numpy")
"""The forms that this machine can run, the best first."""

_DECODING_FORMS: Final = ("avx512", "avx2")

Window = tuple[int, int, int, int]
"""A part of a record: top, left, height and width, in pixels."""


@cache
def chosen() -> str:
    """The form in use: the best, or the one that the environment names.

    Raises:
        OptionError: the environment names a form that this machine cannot run.
    """
    name = os.environ.get(VARIABLE, FORMS[0])
    if name not in FORMS:
        raise OptionError(VARIABLE, name, f"one of {', '.join(FORMS)}, the forms that this machine can run")
    return name


def decodes_windows() -> bool:
    """Whether the form in use decodes parts of JPEGs."""
    return chosen() in _DECODING_FORMS and _jpeg is not None and _jpeg.runs_here()


def decode_window(
    payload: bytes | memoryview, into: npt.NDArray[np.uint8], size: tuple[int, int], window: Window
) -> bool:
    """Decode no more of a JPEG than a window of it, if the form in use can and the JPEG is such as records are.

    Args:
        payload: the JPEG, of this size or anything else.
        into: uint8, the whole picture's pixels of 3 bytes, or of 4 with 255 as the last: within the window they become
            what libjpeg-turbo makes of them, beside it anything; above and below it nothing is written.
        size: height and width of the picture, in pixels.
        window: what is needed.

    Returns:
        Whether the window is there. If not, ``into`` may have been written, and libjpeg-turbo tells what the payload is.

    Raises:
        ValueError: the window does not lie within the picture, or ``into`` has another size.
    """
    return decodes_windows() and _jpeg.decode(payload, into, *size, *window)


def add(pixels: npt.NDArray[np.uint8], total: npt.NDArray[np.uint16], products: npt.NDArray[np.int64]) -> None:
    """Add a picture to sums, in place.

    Args:
        pixels: (side, side, 3) uint8, C-contiguous.
        total: (side, side, 3) uint16, C-contiguous: pixel by pixel; of 257 pictures at most.
        products: (3, 3) int64: of each product of two channels, over all pixels.

    Raises:
        ValueError: they are not of these shapes.
    """
    if chosen() == "numpy":
        if pixels.shape != total.shape:
            raise ValueError(f"pixels of {pixels.shape} cannot be added to a sum of {total.shape}")
        np.add(total, pixels, out=total)
        flat = pixels.reshape(-1, 3).astype(np.float64)  # exact: below 2**53
        products += (flat.T @ flat).astype(np.int64)
    else:
        assert compiled is not None
        compiled.add(chosen(), pixels, total, products)


def copy(out: npt.NDArray[np.uint8], content: npt.NDArray[np.uint8]) -> None:
    """Copy a frame to where it is read by others: past this CPU's caches where it can, without the GIL.

    Args:
        out: (n,) uint8, C-contiguous.
        content: (n,) uint8, C-contiguous; overlaps ``out`` nowhere.

    Raises:
        ValueError: they are not of one size.
    """
    if chosen() == "numpy":
        if out.shape != content.shape:
            raise ValueError(f"{content.size} bytes do not fill {out.size}")
        np.copyto(out, content)
    else:
        assert compiled is not None
        compiled.copy(out, content)
