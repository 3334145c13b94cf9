"""The Python blocks of docs/library.md, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loader_service import LocalNode

ROOT = Path(__file__).parent.parent
ADDRESS = "tcp://127.0.0.1:5555"


@pytest.mark.timeout(90)
def test_the_pages_blocks_run_as_they_stand(dataset_dir: Path) -> None:
    """Each block runs by itself, at another address and on the CPU, and has the values that its comments promise."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(encoding="utf-8"), re.DOTALL)
    assert all(ADDRESS in block for block in blocks)
    printed = []
    with LocalNode(dataset_dir, workers=1) as node:
        for block in blocks:
            # The first block needs a GPU, a network and a week.
            program = block.replace(ADDRESS, node.address).replace("cuda:0", "cpu").replace("range(90)", "range(2)")
            program = (
                "def train(images, labels): print(tuple(images.shape), images.dtype, tuple(labels.shape))\n" + program
            )
            done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)  # fmt: skip
            assert done.stderr == ""
            printed.append(done.stdout)
    loops, resumed, ahead = printed
    sizes = [128, 128, 44]
    assert loops.splitlines() == [f"({n}, 3, 224, 224) torch.float32 ({n},)" for _ in range(2) for n in sizes]
    assert (resumed, ahead) == ("128\n", "64 64\n")
