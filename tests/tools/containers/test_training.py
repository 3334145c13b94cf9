"""That a training in containers is read as the trainer writes it, and refused when a sample is amiss."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tools.containers import compose, training
from tools.containers.compose import Compose
from tools.errors import ToolFailed
from trainer.run.console import Reporter
from trainer.run.progress import StepRecord

Answer = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the repository's."""
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setattr(compose, "ROOT", tmp_path)
    return tmp_path


def summary(delivered: int) -> str:
    """A run's summary.json, of one epoch with 100 samples."""
    account = {"epoch": 0, "expected": 100, "delivered": delivered, "duplicates_refused": 0, "reassigned": 2}
    shares = {"chance": 0.1, "images_per_s": 200.0, "waiting_share": 0.01}
    paths = {"checkpoint": "c", "log": "l", "figures": list[str]()}
    return json.dumps({"finished": True, "ledger": [account], **shares, **paths})


def test_the_trainers_own_line_from_the_middle_of_an_epoch_is_known() -> None:
    """What `make docker` waits for is what the trainer prints where there is no terminal."""
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
def test_batches_that_come_another_way_are_an_error(answer: Answer, found: list[str]) -> None:
    """Shared memory was promised: TCP, a mixture, or nobody is not it."""
    status = {"clients": [{"transport": transport} for transport in found], "workers": []}
    answer("status --json", json.dumps(status))
    with pytest.raises(ToolFailed, match="were to come by shm, but come by"):
        training.expect_transport(Compose(), "shm")


def test_batches_that_come_as_they_should_pass(answer: Answer) -> None:
    """Several clients by one transport are no mixture."""
    answer("status --json", '{"clients": [{"transport": "shm"}, {"transport": "shm"}], "workers": []}')
    training.expect_transport(Compose(), "shm")


@pytest.mark.parametrize("delivered", [99, 101])
def test_a_sample_too_few_or_too_many_fails_the_run(answer: Answer, root: Path, delivered: int) -> None:
    """The summary is read where the run was copied to, and believed in this alone: that each sample was there once."""
    answer("cp trainer-cpu:/runs/r", summary(delivered))
    with pytest.raises(ToolFailed, match=f"delivered {delivered} of 100 samples"):
        training.copy_run(Compose(), "r")


def test_a_whole_run_is_copied_over_an_earlier_copy(answer: Answer, root: Path) -> None:
    """What is there afterwards is the newest run and nothing else; its account is one line."""
    (root / training.RUNS / "r").mkdir(parents=True)
    (root / training.RUNS / "r" / "old").touch()
    answer("cp trainer-cpu:/runs/r", summary(100))
    folder, found = training.copy_run(Compose(), "r")
    assert [path.name for path in (root / folder).iterdir()] == ["summary.json"]
    assert training.account(found) == "100 of 100 samples in 1 epochs (0 duplicates refused, 2 slices asked for again)"
