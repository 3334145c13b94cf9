"""Fixtures of the examples' tests: the environment with the frameworks, and a node that serves sample photographs.

``make examples`` sets the environment up and runs these tests. In ``make test`` they are skipped, and say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader_service import Loader, LocalNode
from tools.examples.environment import ROOT, RUN, VENV, is_ready

EPOCHS = 3
NOTEBOOK_EPOCHS = 4


@pytest.fixture(scope="session")
def frameworks() -> Path:
    """Provide the Python of the examples' environment."""
    if RUN not in os.environ:
        pytest.skip("takes minutes: `make examples` runs it")
    assert is_ready(), f"{VENV} has no environment with the frameworks: `make examples` makes it"
    return VENV / "bin" / "python"


@pytest.fixture(scope="session")
def photographs(frameworks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Provide the address of a node that serves about 640 views of real photographs for training and 160 for validation."""
    folder = tmp_path_factory.mktemp("photographs")
    for command in (
        ("tools.sample_images", folder / "images", "--views", "800"),
        ("loader_service", "preprocess", folder / "images", folder / "data", "--size", "64", "--codec", "raw"),
    ):
        subprocess.run(
            [sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True, capture_output=True, timeout=100
        )
    with LocalNode(folder / "data", workers=1) as node:
        yield node.address


@pytest.fixture(scope="session")
def order(photographs: str) -> list[list[int]]:
    """Provide the ids of each epoch, in order."""
    with Loader(photographs, batch_size=64, timeout_s=20) as loader:
        return [[record for batch in loader for record in batch.ids.tolist()] for _ in range(NOTEBOOK_EPOCHS)]
