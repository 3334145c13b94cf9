"""Checkpoints: atomic, few, validated when loaded, and written in a thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loader_service import EpochAccount
from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.run import checkpoint
from trainer.run.checkpoint import BEST, KEPT, Checkpoint, Plain, Saver, load, save, saved
from trainer.run.progress import EpochRecord, Progress, Tally
from trainer.schedule import Schedule


def made(step: int = 7) -> Checkpoint:
    plain = Plain(
        config=RunConfig(width=0.25, devices=("cpu", "cpu")),
        progress=Progress(step=step, epoch=1, seen=64, epoch_tally=Tally(1.5, 2.0, 64.0), images=364, trained_s=0.1),
        schedule=Schedule(lr=0.001, patience=5, best=0.25, stalled=1, drops=1),
        loader={
            "format": 1,
            "epoch": 1,
            "position": 64,
            "view": {"kind": "train", "basis": [1.0] * 9},
            "golden": b"\0\xff",
        },
        ledger=[EpochAccount(0, 300, 300, 0, 2, 0)],
        history=[EpochRecord(0, 5, 1.0, 0.5, 1.1, 0.25, 0.0, 0.01)],
        class_names=("ant", "bee"),
        fingerprint="abc",
        count=300,
    )
    weights = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    return Checkpoint(plain, {"w": weights}, {"w": weights * 2}, torch.zeros(256, 256, 3), checkpoint.random_states())


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.plain == other.plain
    for tensors, others in ((one.model, other.model), (one.momentum, other.momentum), (one.random, other.random)):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert torch.equal(one.mean, other.mean)


def test_everything_comes_back(tmp_path: Path) -> None:
    """Tensors, counters, schedule, the loader's position with its bytes, ledger and history are restored."""
    assert_equal(load(save(tmp_path, made(), is_best=False)), made())


def test_only_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """The newest two and the best checkpoint are kept."""
    for step in range(1, 6):
        save(tmp_path, made(step), is_best=step == 2)
    assert [load(path).plain.progress.step for path in saved(tmp_path)] == [4, 5]
    assert load(tmp_path / BEST).plain.progress.step == 2
    assert len(list(tmp_path.iterdir())) == KEPT + 1


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_last_good_one(tmp_path: Path, moment: str) -> None:
    """After a kill before the flush or the rename, the old checkpoint is there and the next save works."""
    old = save(tmp_path, made(1), is_best=False)
    patch = "os.fsync" if moment == "fsync" else "pathlib.Path.replace"
    code = (
        "import os, pathlib, signal, sys; from pathlib import Path; from trainer.run.checkpoint import load, save\n"
        f"{patch} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "old = load(Path(sys.argv[1])); old.plain.progress.step = 2\n"
        "save(Path(sys.argv[1]).parent, old, is_best=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(old)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [load(path).plain.progress.step for path in saved(tmp_path)] == [1]
    save(tmp_path, made(3), is_best=False)
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write raises one sentence and leaves no partial file."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        save(tmp_path, made(), is_best=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_off_file_is_refused(tmp_path: Path, keep: float) -> None:
    """A truncated file is refused, at any length."""
    path = save(tmp_path, made(), is_best=False)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    """The error names the missing file."""
    with pytest.raises(CheckpointError, match=r"nowhere\.pt cannot be used: there is no such file"):
        load(tmp_path / "nowhere.pt")


class Foreign:
    """An object that only code could restore."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"format": 1, "plain": Foreign()}, "damaged or no checkpoint"),
        ({"format": 99}, "not in this trainer's format"),
        ([1, 2], "not in this trainer's format"),
        ({"format": 1, "plain": {}, "tensors": {}}, "its content is invalid"),
        (
            {"format": 1, "plain": msgspec.to_builtins(made().plain), "tensors": {"model": {"w": 3}}},
            "its content is invalid",
        ),
        ({"format": 1, "plain": msgspec.to_builtins(made().plain), "tensors": {}}, "its content is invalid"),
    ],
)
def test_strange_content_is_refused(tmp_path: Path, content: object, sentence: str) -> None:
    """Content with code or of a wrong type is refused, and no code runs."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "x.pt")


def test_random_states_are_taken_over() -> None:
    """torch's generator continues from the restored state."""
    before = checkpoint.random_states()
    drawn = torch.rand(3)
    checkpoint.restore_random_states(before)
    assert torch.equal(torch.rand(3), drawn)


def small(step: int) -> Checkpoint:
    plain = Plain(RunConfig(), Progress(step=step), RunConfig().first_schedule(), {}, [], [], ("ant",), "abc", 300)
    weights = {"w": torch.full((64, 64), float(step))}
    return Checkpoint(plain, weights, weights, torch.zeros(8, 8, 3), {})


def nothing() -> None:
    pass


class Gate:
    """A stand-in for ``checkpoint.save`` that waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self._save = threading.Event(), checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self.save)

    def save(self, folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        assert self._open.wait(10)
        return self._save(folder, whole, is_best)

    def open(self) -> None:
        self._open.set()


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``save`` returns before the write; later changes are not in the file."""
    gate, whole, written = Gate(monkeypatch), small(1), threading.Event()
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
    """A save waits for the previous one, and the end of the context for the last."""
    with Saver(tmp_path) as saver:
        for step in range(1, 5):
            saver.save(small(step), False, nothing)
    assert [checkpoint.load(path).plain.progress.step for path in checkpoint.saved(tmp_path)] == [3, 4]


def test_a_failure_is_told_once_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is reported once, without a call of ``written``, and the next save is tried."""
    save = checkpoint.save

    def full(folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        raise CheckpointError(folder, "it cannot be written (No space left on device)")

    with Saver(tmp_path) as saver:
        monkeypatch.setattr(checkpoint, "save", full)
        saver.save(small(1), False, lambda: pytest.fail("it was not written"))
        saver.wait()
        assert "No space left" in str(saver.failure())
        assert saver.failure() is None
        monkeypatch.setattr(checkpoint, "save", save)
        saver.save(small(2), False, nothing)
        saver.finish()
    assert len(checkpoint.saved(tmp_path)) == 1


def test_the_last_one_must_be_written(tmp_path: Path) -> None:
    """``finish`` raises the error of the last write."""
    (tmp_path / "file").touch()
    with Saver(tmp_path / "file") as saver:
        saver.save(small(1), False, nothing)
        with pytest.raises(CheckpointError, match="cannot be written"):
            saver.finish()


# Saves without an end, and says each time that one is on the disk; its parent kills it at any moment.
ENDLESS = """
import sys, itertools, torch
from pathlib import Path
from trainer.run import checkpoint
from trainer.run.checkpoint import Saver

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
    """After a kill, the newest checkpoint is complete and at least as new as the last one reported."""
    checkpoint.save(tmp_path, small(1), False)
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
