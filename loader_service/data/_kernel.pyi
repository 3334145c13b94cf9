"""The compiled kernel; see _kernel.c. It takes C-contiguous arrays, and checks their sizes before it writes anything."""

from typing import Any

import numpy.typing as npt

def forms() -> list[str]: ...
def augment(
    form: str,
    images: npt.NDArray[Any],
    values: list[memoryview],
    draws: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    numbers: npt.NDArray[Any],
    at: npt.NDArray[Any] | None,
    mean: npt.NDArray[Any] | None,
    record_side: int,
) -> int: ...
def copy(out: npt.NDArray[Any], content: npt.NDArray[Any]) -> None: ...
def add(form: str, pixels: npt.NDArray[Any], total: npt.NDArray[Any], products: npt.NDArray[Any]) -> None: ...
def walk(out: npt.NDArray[Any], start: int, count: int, keys: npt.NDArray[Any]) -> None: ...
