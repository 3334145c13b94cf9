"""What is refused where it cannot run."""

from __future__ import annotations

import os

import pytest
import torch

from trainer.errors import ConfigError
from trainer.model.speed import Speed, check_speed, deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_graphs_need_gpus() -> None:
    """The sentence says what to do."""
    with pytest.raises(ConfigError, match="--no-cuda-graphs"):
        check_speed(Speed(cuda_graphs=True), [GPU, CPU])
    check_speed(Speed(cuda_graphs=True), [GPU])


def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before training, not after the first batch."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        check_speed(Speed(compile=True), [CPU])
    check_speed(Speed(), [CPU])


def test_an_unknown_precision_is_refused() -> None:
    """Also in a configuration that was read from a file."""
    with pytest.raises(ConfigError, match="one of off, bf16"):
        Speed(amp="fp8")  # type: ignore[arg-type]


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_torch_is_told_and_told_back() -> None:
    """Kernels, cuDNN's and cuBLAS's; afterwards everything is as before."""
    before = settings()
    with deterministic(True):
        assert settings() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before


def test_nothing_changes_unasked() -> None:
    """The fastest kernels are the default."""
    before = settings()
    with deterministic(False):
        assert settings() == before
