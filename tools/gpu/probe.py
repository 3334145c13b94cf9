"""Facts about this Python's PyTorch and GPUs, as one line of JSON: ``python -m tools.gpu.probe``.

A process of its own: importing torch and opening a GPU take seconds and memory that the command itself does not need.
"""

from __future__ import annotations

import sys
from typing import Final

import msgspec
import torch

GIB: Final = 2**30


class Probe(msgspec.Struct, frozen=True):
    """Facts about PyTorch.

    Fields:
        torch, cuda: versions; ``cuda`` is empty for a build without CUDA.
        gpus: name of each GPU that works.
        memory_gib: memory of the first GPU.
        problem: PyTorch's message if there is a GPU build but no GPU that works.
    """

    torch: str
    cuda: str
    gpus: tuple[str, ...]
    memory_gib: float
    problem: str


def probe() -> Probe:
    """Return the facts; one small computation on each GPU proves that it works."""
    gpus: list[str] = []
    memory, problem = 0.0, ""
    try:
        for number in range(torch.cuda.device_count()):
            torch.ones(8, device=f"cuda:{number}").sum().item()
            gpus.append(torch.cuda.get_device_name(number))
        memory = torch.cuda.get_device_properties(0).total_memory / GIB if gpus else 0.0
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
    return Probe(str(torch.__version__), torch.version.cuda or "", tuple(gpus), memory, problem)


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(probe()).decode() + "\n")
