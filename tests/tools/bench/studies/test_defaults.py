"""The study of defaults in a tiny run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tools.bench.contest import Turn
from tools.bench.report.document import machine
from tools.bench.studies.defaults import SETTINGS, Cell, Cells, markdown

ROOT = Path(__file__).parents[4]


def turn(rate: float, cpu: float = 1.0) -> Turn:
    """Return a turn with this rate and these CPU milliseconds per image."""
    return Turn(images_per_s=rate, cpu_ms=cpu, consumer_cpu_ms=0.0, memory_mb=1.0)


def cell(setting: str, where: str) -> Cell:
    """Return a measurement with all values of a setting at ten images per second."""
    return Cell("2026-01-01 00:00", where, 0.5, {value: [turn(10)] for value in SETTINGS[setting].values})


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "tools.bench.studies.defaults", *options]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=90)


@pytest.fixture
def records(dataset_dir: Path, tmp_path: Path) -> Path:
    """A folder of records as ``make bench`` makes it."""
    for codec in ("raw", "jpeg"):
        (tmp_path / codec).symlink_to(dataset_dir)
    return tmp_path


def test_a_run_adds_to_earlier_results_of_this_machine(records: Path, tmp_path: Path) -> None:
    """The document has the new table and the earlier one, and no table of another machine."""
    kept, document = tmp_path / "defaults.json", tmp_path / "defaults.md"
    before: Cells = {
        "prefetch": {"raw-shm": cell("prefetch", machine())},
        "spares": {"raw-shm": cell("spares", "else")},
    }
    kept.write_bytes(msgspec.json.encode(before))
    small = ("--rounds", "1", "--seconds", "0.05", "--records", str(records), "--build", str(tmp_path))
    done = run("--only", "affinity", "--way", "raw-shm", "--document", str(document), *small)
    assert done.returncode == 0, done.stderr
    cells = msgspec.json.decode(kept.read_bytes(), type=Cells)
    assert all(turns[0].images_per_s > 0 for turns in cells["affinity"]["raw-shm"].rounds.values())
    assert cells["prefetch"] == before["prefetch"]
    text = document.read_text()
    assert [SETTINGS[name].title in text for name in ("affinity", "prefetch", "spares")] == [True, True, False]


def test_ratios_are_taken_within_a_round() -> None:
    """A value is shown by the medians of its ratios to the default, the default by its rate."""
    rounds = {"2": [turn(8), turn(9, 3.0), turn(40)], "4": [turn(10), turn(10), turn(20)], "8": [turn(1)] * 3}
    text = markdown({"prefetch": {"raw-shm": Cell("2026-01-01 00:00", "here", 0.5, rounds)}}, "The end.")
    assert "| 2 | 0.90 (0.80 to 2.00); CPU 1.00 |\n| **4** | 10 (10 to 20) images/s |" in text
    assert text.endswith("The end.\n")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "there are no raw records in nowhere; make bench makes them."),
        (("--only", "nothing"), "'nothing' is not one of 'prefetch'"),
    ],
)
def test_an_impossible_run_is_one_sentence(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    """The error is one sentence, and nothing is written."""
    done = run("--records", "nowhere", "--build", str(tmp_path), *options)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
