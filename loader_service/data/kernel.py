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

All forms make the same bytes. The environment variable LOADER_SERVICE_KERNEL names another form than the best.
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

compiled: Final = _kernel
"""The extension; None where there is none, and then "numpy" is the only form."""

VARIABLE: Final = "LOADER_SERVICE_KERNEL"

FORMS: Final[tuple[str, ...]] = (*(compiled.forms() if compiled else ()), "numpy")
"""The forms that this machine can run, the best first."""


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
