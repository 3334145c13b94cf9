"""Checkpoints written beside the training: of the moment they were asked for, and never half there."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint, Plain
from trainer.run.progress import Progress
from trainer.run.saver import Saver


def made(step: int) -> Checkpoint:
    plain = Plain(RunConfig(), Progress(step=step), RunConfig().first_schedule(), {}, [], [], ("ant",), "abc", 300)
    weights = {"w": torch.full((64, 64), float(step))}
    return Checkpoint(plain, weights, weights, torch.zeros(8, 8, 3), {})


def nothing() -> None:
    pass


class Gate:
    """Stands in for ``checkpoint.save``: does not begin to write before it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self._save = threading.Event(), checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self.save)

    def save(self, folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        assert self._open.wait(10)
        return self._save(folder, whole, is_best)

    def open(self) -> None:
        self._open.set()


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``save`` returns before anything is written; what changes afterwards is not in the file."""
    gate, whole, written = Gate(monkeypatch), made(1), threading.Event()
    with Saver(tmp_path) as saver:
        saver.save(whole, False, written.set)
        assert not written.is_set()
        whole.model["w"].fill_(9.0)
        whole.plain.progress.step = 2
        gate.open()
        saver.finish()
        assert written.is_set()
    (path,) = checkpoint.saved(tmp_path)
    found = checkpoint.load(path)
    assert found.plain.progress.step == 1
    assert found.model["w"].eq(1.0).all()


def test_one_is_written_after_the_other(tmp_path: Path) -> None:
    """A save waits for the one before, and leaving for the last."""
    with Saver(tmp_path) as saver:
        for step in range(1, 5):
            saver.save(made(step), False, nothing)
    assert [checkpoint.load(path).plain.progress.step for path in checkpoint.saved(tmp_path)] == [3, 4]


def test_a_failure_is_told_once_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends no training, and ``written`` is not called."""
    save = checkpoint.save

    def full(folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        raise CheckpointError(folder, "it cannot be written (No space left on device)")

    with Saver(tmp_path) as saver:
        monkeypatch.setattr(checkpoint, "save", full)
        saver.save(made(1), False, lambda: pytest.fail("it was not written"))
        saver.wait()
        assert "No space left" in str(saver.failure())
        assert saver.failure() is None
        monkeypatch.setattr(checkpoint, "save", save)
        saver.save(made(2), False, nothing)
        saver.finish()
    assert len(checkpoint.saved(tmp_path)) == 1


def test_the_last_one_must_be_written(tmp_path: Path) -> None:
    """``finish`` raises what went wrong."""
    (tmp_path / "file").touch()
    with Saver(tmp_path / "file") as saver:
        saver.save(made(1), False, nothing)
        with pytest.raises(CheckpointError, match="cannot be written"):
            saver.finish()


# Saves without an end, and says each time that one is on the disk; its parent kills it at any moment.
ENDLESS = """
import sys, itertools, torch
from pathlib import Path
from trainer.run import checkpoint
from trainer.run.saver import Saver

folder = Path(sys.argv[1])
whole = checkpoint.load(checkpoint.saved(folder)[-1])
whole.model["w"] = torch.zeros(1024, 1024)
with Saver(folder) as saver:
    for step in itertools.count(2):
        whole.plain.progress.step = step
        whole.model["w"].fill_(step)
        saver.save(whole, True, lambda: print(flush=True))
"""


def test_a_kill_at_any_moment_leaves_a_good_one(tmp_path: Path) -> None:
    """Whatever was being written: the newest checkpoint is whole, and no older than the last that was promised."""
    checkpoint.save(tmp_path, made(1), False)
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    process.kill()
    promised = 1 + 5 + len(process.stdout.read().splitlines())
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    newest = checkpoint.load(checkpoint.saved(tmp_path)[-1])
    assert newest.plain.progress.step >= promised
    assert newest.model["w"].eq(newest.plain.progress.step).all()
