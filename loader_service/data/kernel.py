"""The kernel: the inner loops, in the best form that this machine can run.

====== ===========================================================================================
form   requirement
====== ===========================================================================================
avx512 x86-64 with AVX-512 VBMI (Ice Lake, Zen 4 and later)
avx2   x86-64 with AVX2
neon   arm64
c      the compiled extension
numpy  none; it defines the bytes, and is the fallback where the extension was not compiled
====== ===========================================================================================

The vector forms of x86-64 also decode JPEGs themselves, only as far as a crop needs; with the other forms libjpeg-turbo
decodes whole images. All forms make the same bytes. The environment variable LOADER_SERVICE_KERNEL selects another form.
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
"""The extension module; None if it was not compiled, and then "numpy" is the only form."""

VARIABLE: Final = "LOADER_SERVICE_KERNEL"

FORMS: Final[tuple[str, ...]] = (*(compiled.forms() if compiled else ()), "numpy")
"""The forms that this machine can run, best first."""

_DECODING_FORMS: Final = ("avx512", "avx2")
"""Forms that decode parts of JPEGs. "c" and "numpy" never do, so that choosing them tests libjpeg-turbo's path."""

Window = tuple[int, int, int, int]
"""A part of an image: top, left, height and width, in pixels."""


@cache
def chosen() -> str:
    """Return the form in use: the best one, or the one that the environment variable names.

    Raises:
        OptionError: the environment names a form that this machine cannot run.
    """
    name = os.environ.get(VARIABLE, FORMS[0])  # read once per process: a slice must not mix forms
    if name not in FORMS:
        raise OptionError(VARIABLE, name, f"one of {', '.join(FORMS)}, the forms that this machine can run")
    return name


def decodes_windows() -> bool:
    """Return True if the form in use decodes parts of JPEGs."""
    return chosen() in _DECODING_FORMS and _jpeg is not None and _jpeg.runs_here()


def decode_window(
    payload: bytes | memoryview, into: npt.NDArray[np.uint8], size: tuple[int, int], window: Window
) -> bool:
    """Decode one window of a JPEG, if the form in use can and the JPEG is of the common kind (see _jpeg.c).

    Args:
        payload: a JPEG; it may be damaged, or of another size.
        into: uint8, buffer for the whole image, 3 bytes a pixel, or 4 with 255 as the last. Pixels within the window get
            the values that libjpeg-turbo gives; the rest of the window's rows is undefined; other rows are not written.
        size: height and width of the image, in pixels.
        window: the part that is needed.

    Returns:
        True if the window was decoded. If False, ``into`` may have been partly written: let libjpeg-turbo decode the
        payload, or say what is wrong with it.

    Raises:
        ValueError: the window does not lie within the image, or ``into`` has another size.
    """
    # It keeps the GIL, which guards its static tables.
    return decodes_windows() and _jpeg.decode(payload, into, *size, *window)


def add(pixels: npt.NDArray[np.uint8], total: npt.NDArray[np.uint16], products: npt.NDArray[np.int64]) -> None:
    """Add an image to sums, in place.

    Args:
        pixels: (side, side, 3) uint8, C-contiguous.
        total: (side, side, 3) uint16, C-contiguous, sum of each pixel; it holds 257 images before it overflows.
        products: (3, 3) int64, sum over all pixels of the product of each two channels.

    Raises:
        ValueError: an array has another shape.
    """
    if chosen() == "numpy":
        if pixels.shape != total.shape:
            raise ValueError(f"pixels of {pixels.shape} cannot be added to a sum of {total.shape}")
        np.add(total, pixels, out=total)  # uint16 + uint8, without a temporary array
        flat = pixels.reshape(-1, 3).astype(np.float64)  # exact: sums stay below 2**53
        products += (flat.T @ flat).astype(np.int64)
    else:
        assert compiled is not None
        compiled.add(chosen(), pixels, total, products)


def copy(out: npt.NDArray[np.uint8], content: npt.NDArray[np.uint8]) -> None:
    """Copy a frame to memory that another device or process reads, without the GIL and past the CPU's caches if possible.

    Args:
        out: output, (n,) uint8, C-contiguous.
        content: (n,) uint8, C-contiguous; must not overlap ``out``.

    Raises:
        ValueError: the sizes differ.
    """
    if chosen() == "numpy":
        if out.shape != content.shape:
            raise ValueError(f"{content.size} bytes do not fill {out.size}")
        np.copyto(out, content)
    else:
        assert compiled is not None
        compiled.copy(out, content)
