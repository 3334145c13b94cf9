"""The machine's limit for copying crops: C memcpy, compiled when it is needed."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_service.data.codecs import HEADER
from loader_service.types import RECORD_SIDE_PX

_SOURCE = Path(__file__).with_name("limit.c")


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "limit.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O3", "-shared", "-fPIC", "-o", path, _SOURCE], check=True)
        return ctypes.CDLL(str(path))


def first_pixels(values: list[memoryview], draws: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Where each record's crop begins in memory: (n,) uint64 addresses."""
    bases = [np.frombuffer(value, np.uint8).ctypes.data for value in values]
    rows, columns = draws["y"].astype(np.uint64), draws["x"].astype(np.uint64)
    addresses: npt.NDArray[np.uint64] = np.array(bases, np.uint64) + (rows * RECORD_SIDE_PX + columns) * 3 + HEADER.size
    return addresses


def copy_crops(images: npt.NDArray[np.uint8], addresses: npt.NDArray[np.uint64]) -> None:
    """Copy the crops at ``addresses`` to ``images``, (n, side, side, 3) uint8, without the GIL."""
    n, side = images.shape[:2]
    pointers: Any = addresses.ctypes.data_as(ctypes.c_void_p)
    sizes = (ctypes.c_size_t(v) for v in (n, side, 3 * side, 3 * RECORD_SIDE_PX))
    _library().copy_crops(images.ctypes.data_as(ctypes.c_void_p), pointers, *sizes)
