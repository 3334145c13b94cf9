"""The whole script on a CPU with tiny sizes, killed in between, and its document."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.gpu.command import main
from tools.gpu.parts import Name
from tools.gpu.probe import Probe
from tools.gpu.report import markdown
from tools.gpu.results import (
    Agreement,
    Fed,
    Learned,
    Loading,
    Machine,
    Marked,
    Outcome,
    Rate,
    Results,
    Status,
    load,
    save,
)

ROOT = Path(__file__).parents[3]


def command(folder: Path, *options: str) -> list[str]:
    """Return the command of a dry run in a folder."""
    return [sys.executable, "-m", "tools.gpu", "--dry", "--folder", str(folder), *options]


def environment() -> dict[str, str]:
    """Return an environment in which every process uses one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def stopped_and_continued(folder: Path, first: str, title: str, *options: str) -> Results:
    """Send SIGINT when the part with ``title`` begins, after those in ``first``; do the rest in another call; return its results."""
    with subprocess.Popen(
        command(folder, *options), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(title):
                process.send_signal(signal.SIGINT)
                break
        shown = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "gpu: stopped." in shown
    assert "| bf16 | one device | yes |" in (folder / "gpu.md").read_text()
    stopped = outcomes(folder)
    assert {piece.partition("/")[0] for piece in stopped} == set(first.split(","))

    done = CliRunner(env={"OMP_NUM_THREADS": "1"}).invoke(main, ["--dry", "--folder", str(folder), *options])
    assert done.exit_code == 0, done.stderr
    assert "everything is measured" in done.stderr
    results = load(folder / "results.json")
    assert results is not None
    assert {str(outcome.status) for outcome in results.outcomes.values()} == {"done"}
    assert {piece: results.outcomes[piece] for piece in stopped} == stopped
    assert all(row.agrees for row in results.of(Name.AGREEMENT, Agreement))
    document = (folder / "gpu.md").read_text()
    assert "its figures mean nothing" in document
    assert document == markdown(results, "results.json")
    return results


def test_two_parts_stopped_and_continued(tmp_path: Path) -> None:
    """Ctrl-C in the second part keeps the first; the next call does the rest, and the document has both."""
    results = stopped_and_continued(tmp_path, "agreement", "Loaders alone", "--parts", "agreement,loaders")
    assert set(loaders(results)) == {"this project, shared memory, raw", "PyTorch DataLoader, LMDB raw"}


@pytest.mark.long
@pytest.mark.timeout(400)  # a minute on an idle machine
def test_the_whole_script_stopped_and_continued(tmp_path: Path) -> None:
    """Ctrl-C in the third part keeps the two before; the next call does the rest, and the document has all of it."""
    results = stopped_and_continued(tmp_path, "tests,agreement", "Speed beside")
    assert all(row.images_per_s for row in results.of(Name.SPEED, Rate))
    fed = {row.path: row for row in results.of(Name.FEED, Fed)}
    assert set(fed) == {"synthetic", "pinned slots", "pageable memory", "trainer's feed"}
    assert sum(fed["pinned slots"].waits.values()) == pytest.approx(1)
    assert set(loaders(results)) == {"this project, shared memory, raw", "PyTorch DataLoader, LMDB raw"}
    [learned] = results.of(Name.CIFAR10, Learned)
    assert learned.epochs == 1
    assert learned.ten_crop_error is not None


def loaders(results: Results) -> list[str]:
    """Return the titles of the loaders that were measured."""
    return [row.title for row in results.of(Name.LOADERS, Loading) if row.images_per_s]


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Return the outcomes in a folder's results."""
    results = load(folder / "results.json")
    assert results is not None
    return results.outcomes


def refused(monkeypatch: pytest.MonkeyPatch, found: Probe, *options: str) -> str:
    """Return the one sentence with which the command ends on a machine with this PyTorch."""
    monkeypatch.setattr("tools.gpu.command.probe", lambda: found)
    done = CliRunner().invoke(main, list(options))
    assert done.exit_code
    [sentence] = done.stderr.strip().splitlines()
    return sentence


CPU = Probe("2.13.0+cpu", "", (), 0.0, "")


def test_results_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A place that cannot be written, a file of another program, and one of a newer version, each named."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    newer = tmp_path / "gpu.json"
    save(newer, Results(format=2))
    dry = ("--dry", "--folder", str(tmp_path))
    unwritable = refused(monkeypatch, CPU, *dry, "--results", str(blocked / "results.json"))
    assert "cannot be" in unwritable
    assert "Not a directory" in unwritable
    assert "does not hold results" in refused(monkeypatch, CPU, *dry, "--results", str(blocked))
    assert "has format 2, but this version reads 1" in refused(monkeypatch, CPU, *dry, "--results", str(newer))


def test_without_a_gpu_the_dry_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without CUDA is told from a GPU that does not work; the latter's message is shown."""
    assert "a build without CUDA" in refused(monkeypatch, CPU)
    broken = refused(monkeypatch, Probe("2.11.0", "13.0", (), 0.0, "no driver"))
    assert "(no driver); --dry runs the same script" in broken


def test_results_of_another_machine_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They get a name of their own, and a new file begins."""
    path = tmp_path / "results.json"
    save(path, Results(changed="2026-01-02 03:04 UTC", dry=True))
    monkeypatch.setattr("tools.gpu.command.probe", lambda: CPU)
    done = CliRunner().invoke(main, ["--dry", "--folder", str(tmp_path), "--parts", "", "--results", str(path)])
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "results-2026-01-02-0304-UTC.json") is not None
    results = load(path)
    assert results is not None
    assert results.machine is not None


def test_the_committed_document_is_what_its_results_say() -> None:
    """docs/gpu.md is written from docs/results/gpu.json; without one it says that nothing was measured."""
    results = load(ROOT / "docs" / "results" / "gpu.json")
    document = (ROOT / "docs" / "gpu.md").read_text()
    assert document == markdown(results, "docs/results/gpu.json")
    assert (results is None) == ("Nothing has been measured yet" in document)


def filled() -> Results:
    """Return results with figures on both sides of the targets."""
    results = Results()
    results.put("agreement/a", Agreement("a", form="bf16, graphs", layout="one device", agrees=False))
    results.put("speed/b", Rate("1", title="bf16, graphs", batch=128, images_per_s=[90_000]))
    results.put("speed/b", Rate("2", title="bf16", batch=128, images_per_s=[31_000, 33_000, 35_000], used=0.14))
    results.put("speed/b", Rate("3", title="bf16", batch=512, images_per_s=[40_000]))
    results.put("speed/b", Rate("4", title="torchvision", batch=128, images_per_s=[30_000], peer=True))
    results.put("feed/c", Fed("trainer, synthetic", path="synthetic", codec="raw", batch=128, images_per_s=[1000]))
    results.put("feed/c", Fed("trainer, fed", path="trainer's feed", codec="raw", batch=128, images_per_s=[985]))
    results.put("cifar10/run", Learned("run", epochs=90, of_epochs=90, ten_crop_error=0.13))
    results.put("tests/pytest", Marked("pytest", passed=3, failed=1, failures=["tests.a::b: no"]))
    results.outcomes["cifar10/run"] = Outcome(Status.DONE, "", 1.0)
    return results


def test_targets_stand_next_to_figures() -> None:
    """Medians are compared; a form that differs from the plain one meets no target."""
    results = filled()
    results.machine = Machine(("NVIDIA H100",), 80.0, "2.11.0", "13.0", "3.12.3", "16 cores")
    text = markdown(results, "results.json")
    assert "| 32,000 images/s at batch 128 on an H100 or better | 33,000 (bf16) | yes |" in text
    assert "| 49,000 images/s at batch 512 on an H100 or better | 40,000 (bf16) | no |" in text
    assert "| faster than torchvision's AlexNet at batch 128 | 1.10 times | yes |" in text
    assert "| faster than torchvision's AlexNet at batch 512 | - | not measured |" in text
    assert "98.5% (raw, batch 128) | yes |" in text
    assert "13.0% after 90 of 90 epochs | no |" in text
    assert "3 passed, 1 failed, 0 skipped." in text
    assert "`tests.a::b: no`" in text
