"""``--deterministic``: asked of torch while training, and not longer."""

from __future__ import annotations

import os

import torch

from trainer.parallel.determinism import deterministic


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
