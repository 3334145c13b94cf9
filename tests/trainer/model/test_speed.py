"""Execution options: their requirements, and deterministic kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from trainer.errors import ConfigError
from trainer.model.speed import Speed, check_speed, numerics

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


@pytest.fixture
def tools_for_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pretend a machine that has all that Triton needs."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))


ON_GPU = [("--compile", Speed(compile=True)), ("--fused-norm", Speed(fused_norm=True))]


@pytest.mark.usefixtures("tools_for_triton")
@pytest.mark.parametrize(("option", "speed"), ON_GPU)
def test_kernels_for_gpus_need_tools(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, speed: Speed
) -> None:
    """Each missing requirement is named with its remedy, before training; a CPU and the plain form need none of them."""

    def refused(expected: str) -> None:
        with pytest.raises(ConfigError, match=expected) as error:
            check_speed(speed, [GPU])
        assert error.value.option == option
        check_speed(Speed(), [GPU])
        check_speed(Speed(fused_norm=True), [CPU])

    check_speed(speed, [GPU])
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused("the package triton")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        refused("a C compiler.*install gcc, or set CC")
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
        refused("Python's headers in /nowhere.*install python3-dev")
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
        refused(f"{tmp_path}/TRITON_CACHE_DIR is on a file system from which no code may run.*set TRITON_CACHE_DIR")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        refused("cannot be written.*set TRITON_CACHE_DIR")


@pytest.mark.usefixtures("tools_for_triton")
def test_the_default_cache_of_triton_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a variable, Triton's cache is in the home folder."""
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(ConfigError, match=f"{tmp_path}/home/.triton/cache is on a file system"):
        check_speed(Speed(fused_norm=True), [GPU])


def test_what_no_gpu_has_run_is_off_there() -> None:
    """Channels-last and fused SGD are on by default on CPUs only; a given value holds everywhere."""
    assert (Speed().on([CPU]).channels_last, Speed().on([CPU]).fused_sgd) == (True, True)
    assert (Speed().on([GPU]).channels_last, Speed().on([GPU, GPU]).fused_sgd) == (False, False)
    given = Speed(channels_last=True, fused_sgd=False)
    assert given.on([GPU]) == given.on([CPU]) == given


@pytest.mark.parametrize("value", ["true", "false", "null"])
def test_configurations_of_every_version_are_read(value: str) -> None:
    """Files have true or false, as version 0.1 wrote, or null for a choice by the devices."""
    speed = msgspec.json.decode(f'{{"channels_last": {value}, "fused_sgd": {value}}}', type=Speed)
    assert speed.channels_last is speed.fused_sgd is {"true": True, "false": False, "null": None}[value]


def settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    tf32 = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, *tf32


def test_torch_is_told_and_told_back() -> None:
    """torch, cuDNN and cuBLAS are deterministic and exact inside the block; the settings are restored after it."""
    before = settings()
    with numerics(True):
        assert settings() == (True, True, False, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before


def test_the_fastest_kernels_are_the_default() -> None:
    """Without --deterministic, cuDNN chooses the fastest kernels and TF32 is allowed; the settings are restored."""
    before = settings()
    with numerics(False):
        assert settings() == (False, False, True, True, True)
    assert settings() == before
