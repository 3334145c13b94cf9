"""Faster forms of the same arithmetic, each switchable: nothing here changes what is computed, but for rounding.

What has not been measured on a GPU is not the default.
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
"""What cuBLAS needs for one order of its sums; it reads this when it is first used."""


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is run.

    Fields:
        amp: ``bf16`` runs convolutions and products in bfloat16 (autocast). Weights, their gradients and updates, the
            sums within LRN, softmax and the loss stay float32.
        channels_last: maps lie in memory place by place, all channels of a place together.
        compile: each segment of a tower between two meetings is compiled by ``torch.compile``.
        cuda_graphs: each such segment, forward and backward, is one CUDA graph.
        fused_norm: ReLU, LRN and pooling of conv1 and conv2 are one operation; see ``trainer.model.fused``.
        fused_sgd: the update of all parameters of a device is one kernel.
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
"""How a network is evaluated and exported, however it was trained."""


def check_speed(speed: Speed, devices: Sequence[torch.device]) -> None:
    """Make sure that towers on ``devices`` can be run so.

    Raises:
        ConfigError: the machine lacks what an option needs.
    """
    kinds = {device.type for device in devices}
    if speed.cuda_graphs and kinds != {"cuda"}:
        raise ConfigError("--cuda-graphs", "on", "GPUs for all towers; --no-cuda-graphs runs anywhere")
    if not speed.compile:
        return
    if "cpu" in kinds and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("--compile", "on", "a C++ compiler for the CPU, which this machine lacks; install g++")
    if "cuda" in kinds and importlib.util.find_spec("triton") is None:
        raise ConfigError("--compile", "on", "the package triton for GPUs, which this Python lacks; install it")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A block in which torch uses deterministic kernels alone, if that is ``wanted``.

    Order, augmentation, weights and dropout masks hang on the seed alone in any case, and on a CPU so do all sums. On GPUs
    some of the fastest kernels add up in whatever order their threads come; this leaves them out.

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
