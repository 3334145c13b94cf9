"""The soak in a short form, and proof that it finds a leak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos.soak.__main__ import Sample, Verdict, judge
from tools.errors import ToolFailed

ROOT = Path(__file__).parent.parent.parent.parent.parent
BATCHES = 3_000


def _soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--batches", str(BATCHES), "--loaders", "4", "--tolerance", "0.1", "--out", str(folder)]
    command = [sys.executable, "-m", "tools.chaos.soak", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


def test_a_planted_leak_is_found(tmp_path: Path) -> None:
    """Clients that keep 8 KiB of each batch, and leave as much in shared memory, make the run fail by name."""
    ended = _soak(tmp_path, "--leak")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "not flat between 10% and 90% of the run" in ended.stderr
    assert all(part in ended.stderr for part in ("client over shm", "client over tcp", "/dev/shm in use"))
    assert "dispatcher" not in ended.stderr


def test_a_short_run_measures_every_part_and_writes_its_record(tmp_path: Path) -> None:
    """Every process and the shared memory are in the table and the document of a run, and are flat without a leak."""
    document = tmp_path / "soak.md"
    ended = _soak(tmp_path / "out", "--record", str(document))
    parts = ["client over shm", "client over tcp", "dispatcher", "fork server and workers", "/dev/shm in use"]
    assert all(part in ended.stdout for part in parts), ended.stdout + ended.stderr
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert all(f"| {part} |" in document.read_text() for part in parts)


def _samples(sizes: list[int]) -> list[Sample]:
    return [Sample(number / len(sizes), {"some": size}) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "flat"),
    [
        ([1_000] * 100, True),
        ([2_000] * 5 + [1_000] * 95, True),  # the start is not compared
        ([1_000] * 50 + [1_019] * 50, True),
        ([1_000] * 50 + [1_021] * 50, False),
        ([1_000 + number for number in range(100)], False),
        ([1_000] * 50 + [979] * 50, False),
        ([1_000] * 89 + [5_000] + [1_000] * 10, True),  # one outlier at 90 %
    ],
)
def test_drift_is_judged_between_a_tenth_and_nine_tenths(sizes: list[int], flat: bool) -> None:
    """Growth and shrinking of more than 2 % are found, whatever the start and single outliers are."""
    (verdict,) = judge(_samples(sizes))
    assert verdict.flat is flat


def test_what_was_empty_and_is_not_any_more_is_not_flat() -> None:
    """Growth from nothing counts, although it is no share of it."""
    assert not Verdict("some", 0, 1, 1).flat
    assert Verdict("some", 0, 0, 0).flat


def test_a_run_that_is_too_short_to_judge_is_an_error() -> None:
    """Without a sample around both places there is no verdict."""
    with pytest.raises(ToolFailed, match="nothing was measured at 10%"):
        judge(_samples([1]))
