"""The decoder of parts of JPEGs; see _jpeg.c. It checks sizes and windows before it writes anything."""

from typing import Any

import numpy.typing as npt

def decode(
    payload: bytes | memoryview,
    into: npt.NDArray[Any],
    picture_height: int,
    picture_width: int,
    top: int,
    left: int,
    height: int,
    width: int,
) -> bool: ...
def runs_here() -> bool: ...
