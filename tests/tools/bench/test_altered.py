"""The project with other defaults, for the benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loader_service import defaults
from tools.bench.altered import alter
from tools.errors import ToolFailed

ROOT = Path(__file__).parents[3]


def test_a_node_goes_by_the_changed_default(dataset_dir: Path, tmp_path: Path) -> None:
    """Its memory ceiling is that of one send slot for its worker, and the one more that there always is."""
    command = [sys.executable, "-m", "tools.bench.altered", "SEND_SLOTS_PER_WORKER=1", "start", "--workers", "1"]
    command += ["--data", str(dataset_dir), "--bind", f"ipc://{tmp_path}/node", "--parent", str(os.getpid())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
    assert f"at most {2 * defaults.SEND_SLOT_BYTES // 2**20} MiB" in line


@pytest.mark.parametrize("change", ["STALL_S=1", "PREFETCH=0", "PREFETCH", "PREFETCH=many"])
def test_a_change_that_means_nothing_is_refused(change: str) -> None:
    """Otherwise the benchmark would compare a default with itself."""
    with pytest.raises(ToolFailed, match=f"'{change}' is not NAME=VALUE, with one of PREFETCH"):
        alter(change)
