"""Fixtures of the trainer's tests: one thread for torch, and one node for all tests that need data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loader_service import LocalNode


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Limit torch to one thread: small tensors gain nothing from more, and sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def node(dataset_dir: Path) -> Iterator[str]:
    """Yield the address of a node that serves 300 training and 60 validation records of 3 classes."""
    with LocalNode(data=dataset_dir, workers=1) as running:
        yield running.address
