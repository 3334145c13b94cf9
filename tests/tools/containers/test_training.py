"""A training run in containers: its lines, its transport, and the check of its results."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from loader_service import EpochAccount
from tools import terminal
from tools.containers import training
from tools.containers.compose import Compose
from tools.errors import ToolFailed
from tools.results import ledger_line
from trainer.run.console import Reporter
from trainer.run.progress import StepRecord
from trainer.run.summary import Summary

Answer = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the repository."""
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setattr(terminal, "ROOT", tmp_path)
    return tmp_path


def summary(delivered: int) -> str:
    """A run's summary.json, of one epoch with 100 samples."""
    ledger = [EpochAccount(0, 100, delivered, 0, 2)]
    return msgspec.json.encode(Summary(True, 1, 4, 0.5, 0.9, 0.6, 0.1, 200.0, 0.01, ledger, "c", "l", [])).decode()


def test_the_trainers_line_from_the_middle_of_an_epoch_is_known() -> None:
    """`make docker` waits for lines as the trainer prints them without a terminal."""
    screen = io.StringIO()
    with Reporter(Console(file=screen), epochs=2, epoch_size=100) as reporter:
        reporter.step(
            StepRecord(step=1, epoch=0, seen=32, loss=2.9, error=0.9, lr=0.01, images_per_s=250.0, waiting=0.01)
        )
    assert training.MIDDLE.match(screen.getvalue())
    assert training.PROGRESS.match(screen.getvalue())
    assert not training.MIDDLE.match("epoch 1/2 done: loss 2.9")
    assert training.PROGRESS.match("epoch 1/2 done: loss 2.9")


@pytest.mark.parametrize("found", [["tcp"], ["shm", "tcp"], []])
def test_batches_that_come_another_way_are_an_error(
    answer: Answer, status_json: Callable[..., str], found: list[str]
) -> None:
    """TCP, a mixture of transports and no client at all are errors if shared memory is expected."""
    answer("status --json", status_json(found, []))
    with pytest.raises(ToolFailed, match="should come by shm, but come by"):
        training.expect_transport(Compose(), "shm")


def test_batches_that_come_as_they_should_pass(answer: Answer, status_json: Callable[..., str]) -> None:
    """Several clients with one transport pass."""
    answer("status --json", status_json(["shm", "shm"], []))
    training.expect_transport(Compose(), "shm")


@pytest.mark.parametrize("delivered", [99, 101])
def test_a_sample_too_few_or_too_many_fails_the_run(answer: Answer, root: Path, delivered: int) -> None:
    """The summary is read from the copy, and its ledger is checked."""
    answer("cp trainer-cpu:/runs/r", summary(delivered))
    with pytest.raises(ToolFailed, match=f"delivered {delivered} of 100 samples"):
        training.copy_run(Compose(), "r")


def test_a_whole_run_is_copied_over_an_earlier_copy(answer: Answer, root: Path) -> None:
    """The folder afterwards holds the newest run alone; its ledger is one line."""
    (root / training.RUNS / "r").mkdir(parents=True)
    (root / training.RUNS / "r" / "old").touch()
    answer("cp trainer-cpu:/runs/r", summary(100))
    folder, found = training.copy_run(Compose(), "r")
    assert [path.name for path in (root / folder).iterdir()] == ["summary.json"]
    assert ledger_line(found) == "100 of 100 samples in 1 epochs (0 duplicates refused, 2 slices asked for again)"
