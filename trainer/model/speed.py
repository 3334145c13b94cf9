"""Execution options: faster or deterministic forms of the same arithmetic, which differ only in rounding.

Options that have not been measured on a GPU are off by default.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, get_args

import msgspec
import torch

from trainer.errors import ConfigError

Precision = Literal["off", "bf16"]

_WORKSPACE: Final = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Setting with which cuBLAS sums in a fixed order; cuBLAS reads it when it is first used."""


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The execution options of a network.

    Fields:
        amp: ``bf16`` runs convolutions and matrix products in bfloat16 (autocast). Weights, their gradients and updates,
            sums within LRN, softmax and loss stay float32.
        channels_last: use the channels-last memory format for maps.
        compile: compile each segment of a tower between two exchanges with ``torch.compile``.
        cuda_graphs: record each segment, forward and backward, as a CUDA graph.
        fused_norm: run ReLU, LRN and pooling of conv1 and conv2 as one operation; see ``trainer.model.fused``.
        fused_sgd: update all parameters of a device with one kernel.
    """

    amp: Precision = "off"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    fused_norm: bool = False
    fused_sgd: bool = True

    def __post_init__(self) -> None:
        if self.amp not in get_args(Precision):
            raise ConfigError("--amp", self.amp, f"one of {', '.join(get_args(Precision))}")


REFERENCE: Final = Speed()
"""Options for evaluation and export, independent of those in training."""


def check_speed(speed: Speed, devices: Sequence[torch.device]) -> None:
    """Check that towers on ``devices`` can run with these options.

    Raises:
        ConfigError: the machine lacks a requirement of an option.
    """
    kinds = {device.type for device in devices}
    if speed.cuda_graphs and kinds != {"cuda"}:
        raise ConfigError("--cuda-graphs", "on", "GPUs for all towers; use --no-cuda-graphs elsewhere")
    if not speed.compile:
        return
    # torch.compile generates C++ on a CPU and Triton on a GPU; without them it would fail at the first batch.
    if "cpu" in kinds and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("--compile", "on", "a C++ compiler for the CPU, which this machine lacks; install g++")
    if "cuda" in kinds and importlib.util.find_spec("triton") is None:
        raise ConfigError("--compile", "on", "the package triton for GPUs, which this Python lacks; install it")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Restrict torch to deterministic kernels inside the block, if ``wanted`` (``--deterministic``).

    The same command on the same machine then gives the same bits. Order, augmentation, weights and dropout masks depend on
    the seed alone in any case, and on a CPU so do all sums; some of the fastest GPU kernels add up in the order in which
    their threads finish.

    torch raises a RuntimeError with the operation's name if it has no such kernel. By the list in its manual, this network
    has no such operation.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(*_WORKSPACE)  # stays set: cuBLAS reads it only once
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False  # a benchmark may choose another kernel in another run
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
