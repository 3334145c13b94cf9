"""README's example, run as a newcomer would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loader_service import LocalNode

ROOT = Path(__file__).parent.parent
ADDRESS = "tcp://127.0.0.1:5555"


@pytest.mark.timeout(60)
def test_the_example_runs_as_it_stands(dataset_dir: Path) -> None:
    """The only Python block, with only its address changed, prints for every batch what its comments promise."""
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert ADDRESS in example
    with LocalNode(dataset_dir, workers=2) as node:
        program = example.replace(ADDRESS, node.address)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "300 samples of 3 classes; 3 batches per epoch"
    starts = [(int(epoch), int(start)) for epoch, start, _ in (line.split(" ", 2) for line in lines[1:])]
    assert starts == [(epoch, start) for epoch in (0, 1) for start in (0, 128, 256)]
    # The third batch of each epoch has only the 44 samples that are left.
    assert all("(128, 224, 224, 3)" in lines[i] for i in (1, 2, 4, 5))
