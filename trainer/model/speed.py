"""Execution options: faster or deterministic forms of the same arithmetic, which differ only in rounding.

Options that have not been measured on a device's kind are off there by default.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
        channels_last: use the channels-last memory format for maps. None decides by the devices: on for CPUs, where it has
            been measured, off for GPUs, where it has not.
        compile: compile each segment of a tower between two exchanges with ``torch.compile``.
        cuda_graphs: record each segment, forward and backward, as a CUDA graph.
        fused_norm: run ReLU, LRN and pooling of conv1 and conv2 as one operation; see ``trainer.model.fused``.
        fused_sgd: update all parameters of a device with one kernel; None decides as for ``channels_last``.
    """

    amp: Precision = "off"
    channels_last: bool | None = None
    compile: bool = False
    cuda_graphs: bool = False
    fused_norm: bool = False
    fused_sgd: bool | None = None

    def __post_init__(self) -> None:
        if self.amp not in get_args(Precision):
            raise ConfigError("--amp", self.amp, f"one of {', '.join(get_args(Precision))}")

    def on(self, devices: Sequence[torch.device]) -> Speed:
        """Return these options with every None decided for a network on ``devices``."""
        measured = all(device.type == "cpu" for device in devices)
        return msgspec.structs.replace(
            self,
            channels_last=measured if self.channels_last is None else self.channels_last,
            fused_sgd=measured if self.fused_sgd is None else self.fused_sgd,
        )


REFERENCE: Final = Speed()
"""Options for evaluation and export, independent of those in training."""


def check_speed(speed: Speed, devices: Sequence[torch.device]) -> None:
    """Check that towers on ``devices`` can run with these options.

    torch.compile generates C++ on a CPU and Triton kernels on a GPU, where the fused normalisation is one, too. Both are
    compiled at run time: without their tools they would fail at the first batch.

    Raises:
        ConfigError: the machine lacks a requirement of an option; the error says what to install or to set.
    """
    kinds = {device.type for device in devices}
    if speed.cuda_graphs and kinds != {"cuda"}:
        raise ConfigError("--cuda-graphs", "on", "GPUs for all towers; use --no-cuda-graphs elsewhere")
    if speed.compile and "cpu" in kinds:
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise ConfigError("--compile", "on", "a C++ compiler for the CPU, which this machine lacks; install g++")
        _check_headers("--compile")
        _check_cache("--compile", *_inductor_cache())
    for option, wanted in (("--compile", speed.compile), ("--fused-norm", speed.fused_norm)):
        if wanted and "cuda" in kinds:
            _check_triton(option)
    if speed.compile and "cuda" in kinds:
        _check_cache("--compile", *_inductor_cache())


def _check_triton(option: str) -> None:
    """Check for all that Triton needs to compile a kernel and its launcher, a small C extension of Python."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(option, "on", "the package triton for GPUs, which this Python lacks; install it")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        raise ConfigError(
            option, "on", "a C compiler, with which Triton builds the launchers of its kernels; install gcc, or set CC"
        )
    _check_headers(option)
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    _check_cache(option, Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"), "TRITON_CACHE_DIR")


def _inductor_cache() -> tuple[Path, str]:
    """Return the folder in which torch.compile puts its libraries, and the variable that moves it."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    return Path(os.environ.get(name) or tempfile.gettempdir()), name


def _check_headers(option: str) -> None:
    """Check for the headers of this Python, which the generated code includes."""
    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").is_file():
        raise ConfigError(option, "on", f"Python's headers in {folder}, for generated code; install python3-dev")


def _check_cache(option: str, folder: Path, variable: str) -> None:
    """Check that libraries can be written to a cache folder and loaded from it; it need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.statvfs(there).f_flag & os.ST_NOEXEC:
        problem = f"is on a file system from which no code may run (noexec, {there})"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"cannot be written ({there})"
    else:
        return
    raise ConfigError(
        option, "on", f"a folder for compiled code, but {folder} {problem}; set {variable} to another folder"
    )


@contextmanager
def numerics(deterministic: bool) -> Iterator[None]:
    """Choose torch's kernels inside the block; the settings before it are restored.

    By default cuDNN measures its kernels for each new shape and keeps the fastest, and float32 products may use TF32, which
    rounds their inputs to 11 significant bits and adds up in float32. Both affect GPUs only.

    With ``--deterministic``, torch is restricted to deterministic kernels and products stay in full float32. The same
    command on the same machine then gives the same bits. Order, augmentation, weights and dropout masks depend on the seed
    alone in any case, and on a CPU so do all sums; some of the fastest GPU kernels add up in the order in which their threads
    finish. torch raises a RuntimeError with the operation's name if it has no such kernel. By the list in its manual, this
    network has no such operation.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    tf32_before = cudnn.allow_tf32, matmul.allow_tf32
    if deterministic:
        os.environ.setdefault(*_WORKSPACE)  # stays set: cuBLAS reads it only once
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic = True
    cudnn.benchmark = not deterministic  # a benchmark may choose another kernel in another run
    cudnn.allow_tf32 = matmul.allow_tf32 = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        cudnn.allow_tf32, matmul.allow_tf32 = tf32_before
