"""Execution options: their requirements, and deterministic kernels."""

from __future__ import annotations

import os

import pytest
import torch

from trainer.errors import ConfigError
from trainer.model.speed import Speed, check_speed, deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_graphs_need_gpus() -> None:
    """CUDA graphs on a CPU are refused, with the option that helps."""
    with pytest.raises(ConfigError, match="--no-cuda-graphs"):
        check_speed(Speed(cuda_graphs=True), [GPU, CPU])
    check_speed(Speed(cuda_graphs=True), [GPU])


def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler is reported before training."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        check_speed(Speed(compile=True), [CPU])
    check_speed(Speed(), [CPU])


def test_an_unknown_precision_is_refused() -> None:
    """An unknown precision is refused, also in a configuration from a file."""
    with pytest.raises(ConfigError, match="one of off, bf16"):
        Speed(amp="fp8")  # type: ignore[arg-type]


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_torch_is_told_and_told_back() -> None:
    """torch, cuDNN and cuBLAS are deterministic inside the block; the settings are restored after it."""
    before = settings()
    with deterministic(True):
        assert settings() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before


def test_nothing_changes_unasked() -> None:
    """By default torch's settings stay."""
    before = settings()
    with deterministic(False):
        assert settings() == before
