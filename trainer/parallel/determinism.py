"""``--deterministic``: the same bits from every run on the same machine with the same options.

Order, augmentation, weights and dropout masks hang on the seed alone in any case, and on a CPU so do all sums. On GPUs some
of the fastest kernels add up in whatever order their threads come; this leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_WORKSPACE: Final = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""What cuBLAS needs for one order of its sums; it reads this when it is first used."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A block in which torch uses deterministic kernels alone, if that is ``wanted``.

    torch itself raises a RuntimeError that names the operation if there is no such kernel; by the list in its manual, this
    network has no such operation.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(*_WORKSPACE)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
