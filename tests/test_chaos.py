"""A short run of the chaos tool with every kind of fault."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos.faults import FAULTS

ROOT = Path(__file__).parent.parent


def _chaos(*arguments: str, timeout_s: float = 110) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.chaos", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_every_fault_once_and_nothing_is_lost(dataset_dir: Path, tmp_path: Path) -> None:
    """All kinds of faults, overlapping, against two clients and several nodes: each sample once, byte for byte."""
    ended = _chaos("--seed", "1", "--seconds", "8", "--curve", "--data", str(dataset_dir), "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"^│ ([a-z-]+) +│ (\d+) +│ [^│]+ │$", ended.stdout, re.MULTILINE)
    injected = {name: int(times) for name, times in rows}
    assert injected.keys() == FAULTS.keys()
    assert all(injected.values())
    assert ended.stdout.splitlines()[-1].endswith("faults: every sample once, in order, byte for byte.")


@pytest.mark.parametrize("faults", ["", "none-such", "link-cut,none-such"])
def test_an_unknown_fault_is_named(faults: str) -> None:
    """An unknown kind of fault is an option error that lists the known kinds."""
    ended = _chaos("--faults", faults)
    assert ended.returncode == 2
    assert re.search(r"there are worker-killed,", ended.stderr.replace("\n", " "))
