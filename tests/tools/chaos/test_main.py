"""A short run of the chaos tool with every kind of fault."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos.faults import FAULTS, obstacle

ROOT = Path(__file__).parent.parent.parent.parent


def _chaos(*arguments: str, timeout_s: float = 220) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.chaos", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.timeout(240)  # 40 s alone; all kinds of faults take a while on busy cores
def test_every_fault_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """All kinds of faults, overlapping, against three clients and several nodes: each sample once, byte for byte."""
    document = tmp_path / "record.md"
    ended = _chaos("--seed", "1", "--seconds", "8", "--out", str(tmp_path), "--record", str(document))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"^│ ([a-z-]+) +│ (\d+) +│ \d+ +│ [^│]+ │$", ended.stdout, re.MULTILINE)
    acted = {name: int(times) for name, times in rows}
    assert acted.keys() == {name for name in FAULTS if not obstacle(name, curve=True)}
    assert all(acted.values())
    assert ended.stdout.splitlines()[-1].endswith("faults: every sample once, in order, byte for byte.")
    written = document.read_text()
    assert all(FAULTS[name].what in written for name in acted)
    assert f"{sum(acted.values())} faults of {len(acted)} kinds" in written


@pytest.mark.parametrize("faults", ["", "none-such", "link-cut,none-such"])
def test_an_unknown_fault_is_named(faults: str) -> None:
    """An unknown kind of fault is an option error that lists the known kinds."""
    ended = _chaos("--faults", faults)
    assert ended.returncode == 2
    assert re.search(r"there are worker-killed,", ended.stderr.replace("\n", " "))


def test_faults_that_cannot_be_injected_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """Without keys nobody can be taken off a list; the run says so, and ends well without that fault."""
    ended = _chaos("--plain", "--seconds", "0", "--faults", "worker-killed,key-revoked", "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "left out: key-revoked, because nodes and clients have no keys" in ended.stdout
    assert "1 faults:" in ended.stdout
