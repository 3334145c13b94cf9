"""A run that was stopped or killed ends like one that was never stopped, bit for bit, with every schedule.

The rate changes at each checkpoint of these runs in some way: at the next step (cosine, warm-up), at an epoch's start
(step), at an epoch's end (plateau), or by hand (``trainer set-lr``).
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint

EPOCHS, STEPS_PER_EPOCH = 3, 3
OPTIONS = ["--width", "0.02", "--crop", "64", "--epochs", str(EPOCHS), "--batch-size", "100", "--seed", "5"]
OPTIONS += ["--devices", "cpu", "--checkpoint-every", "1", "--log-every", "1", "--lr", "0.02"]

SCHEDULES: Final = {
    "constant": ["--patience", "9"],
    "step": ["--schedule", "step", "--drop-at", "1,2"],
    "plateau": ["--patience", "1"],
    "cosine": ["--schedule", "cosine"],
    "warm-up": ["--warmup", "2.5"],
    "cosine after warm-up": ["--schedule", "cosine", "--warmup", "1.5"],
    "accumulated": ["--schedule", "cosine", "--batch-size", "50", "--accumulate", "2", "--ema", "0.9"],
    "set-lr": ["--patience", "9", "--preset", "original"],
    "set-lr with cosine": ["--schedule", "cosine"],
}
BY_HAND: Final = {"set-lr": 4, "set-lr with cosine": 4}
"""Step after which a rate is requested by ``trainer set-lr``."""

RUN: Final = """
import os, signal, sys
from trainer.cli import main
from trainer.run import checkpoint
from trainer.run.folder import RunFolder
from trainer.run.progress import StepRecord

by_hand, last, number = (int(sys.argv.pop()) for _ in range(3))
append, save = RunFolder.append, checkpoint.save

def append_and_stop(self, record):
    append(self, record)
    if isinstance(record, StepRecord):
        if record.step == by_hand and b"set-lr" not in self.log.read_bytes():
            self.request_rate(0.0123)
        if record.step == last and number == signal.SIGTERM:
            os.kill(os.getpid(), number)

def save_and_kill(folder, whole, is_best):
    path = save(folder, whole, is_best)
    if whole.plain.progress.step == last and number == signal.SIGKILL:
        os.kill(os.getpid(), number)
    return path

RunFolder.append, checkpoint.save = append_and_stop, save_and_kill
main()
"""
"""A command, ended by a real signal: SIGTERM after step ``last``, or SIGKILL as soon as its checkpoint is on the disk."""


def run(processes: Any, node: str, folder: Path, schedule: str, last: int = 0, number: int = 0) -> int | None:
    """Run or resume a training in a process of its own until a signal ends it, and return its exit code."""
    command = ["run", "--loader", node, "--run", folder, *OPTIONS, *SCHEDULES[schedule], "--resume", "auto"]
    ending = (int(number), last, BY_HAND.get(schedule, 0))
    code: int | None = processes.start(RUN, *command, *map(str, ending)).wait(60)[0]
    return code


def newest(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def rates(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["lr"] for row in rows if row["event"] == "step"}


@pytest.fixture(scope="module")
def unbroken(processes: Any, node: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function of a schedule: the folder of a run that was never stopped."""
    folders: dict[str, Path] = {}

    def folder(schedule: str) -> Path:
        if schedule not in folders:
            folders[schedule] = tmp_path_factory.mktemp("unbroken") / "run"
            assert run(processes, node, folders[schedule], schedule) == 0
        return folders[schedule]

    return folder


def assert_same_end(folder: Path, other: Path) -> None:
    """Compare weights, velocities, moving averages, schedule, position and the rate of every step, bit for bit."""
    end, expected = newest(folder), newest(other)
    assert end.plain.progress.step == expected.plain.progress.step == EPOCHS * STEPS_PER_EPOCH
    assert rates(folder) == rates(other)
    for tensors, others in ((end.model, expected.model), (end.momentum, expected.momentum), (end.ema, expected.ema)):
        assert tensors.keys() == others.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert end.plain.schedule == expected.plain.schedule
    assert end.plain.history == expected.plain.history
    assert end.plain.loader == expected.plain.loader


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stopped_and_killed(processes: Any, node: str, tmp_path: Path, unbroken: Any, schedule: str) -> None:
    """SIGTERM at the last step of an epoch, before validation and drop; SIGKILL after the save at the next epoch's end."""
    assert run(processes, node, tmp_path / "run", schedule, STEPS_PER_EPOCH, signal.SIGTERM) == 0
    assert newest(tmp_path / "run").plain.progress.step == STEPS_PER_EPOCH
    last = 2 * STEPS_PER_EPOCH
    assert run(processes, node, tmp_path / "run", schedule, last, signal.SIGKILL) == -signal.SIGKILL
    assert newest(tmp_path / "run").plain.progress.step == last
    assert run(processes, node, tmp_path / "run", schedule) == 0
    assert_same_end(tmp_path / "run", unbroken(schedule))


@pytest.mark.parametrize("schedule", ["step", "plateau"])
def test_stopped_and_killed_beside_the_drop(
    processes: Any, node: str, tmp_path: Path, unbroken: Any, schedule: str
) -> None:
    """SIGTERM one step after a drop, then SIGKILL one step before the next."""
    assert run(processes, node, tmp_path / "run", schedule, STEPS_PER_EPOCH + 1, signal.SIGTERM) == 0
    last = 2 * STEPS_PER_EPOCH - 1
    assert run(processes, node, tmp_path / "run", schedule, last, signal.SIGKILL) == -signal.SIGKILL
    assert run(processes, node, tmp_path / "run", schedule) == 0
    assert_same_end(tmp_path / "run", unbroken(schedule))


def test_the_schedules_change_the_rate(unbroken: Any) -> None:
    """The runs above have the rates that they are about."""
    assert len(set(rates(unbroken("constant")).values())) == 1
    assert len(set(rates(unbroken("step")).values())) == 3
    assert len(set(rates(unbroken("plateau")).values())) > 1
    assert len(set(rates(unbroken("cosine")).values())) == EPOCHS * STEPS_PER_EPOCH
    assert len(set(rates(unbroken("warm-up")).values())) > STEPS_PER_EPOCH
    assert rates(unbroken("set-lr"))[5] == 0.0123 != rates(unbroken("set-lr"))[4]


@pytest.mark.parametrize(
    ("schedule", "last", "number"),
    [
        ("plateau", STEPS_PER_EPOCH, signal.SIGKILL),
        ("cosine", STEPS_PER_EPOCH + 1, signal.SIGTERM),
        ("warm-up", STEPS_PER_EPOCH + 1, signal.SIGKILL),
        ("set-lr", STEPS_PER_EPOCH + 2, signal.SIGTERM),
    ],
)
def test_a_checkpoint_of_format_1(
    processes: Any, node: str, tmp_path: Path, unbroken: Any, schedule: str, last: int, number: int
) -> None:
    """A file with -v / rate of its last step, as version 0.1 wrote it, ends at the same weights up to rounding."""
    run(processes, node, tmp_path / "run", schedule, last, number)
    for path in checkpoint.saved(tmp_path / "run" / "checkpoints"):
        made_format_1(path, rates(tmp_path / "run"))
    assert run(processes, node, tmp_path / "run", schedule) == 0
    end, expected = newest(tmp_path / "run"), newest(unbroken(schedule))
    for name, weights in expected.model.items():
        torch.testing.assert_close(end.model[name], weights, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(end.momentum[name], expected.momentum[name], rtol=1e-3, atol=1e-8)


def made_format_1(path: Path, rate_of: dict[int, float]) -> None:
    """Rewrite a checkpoint as version 0.1 would have written it."""
    content = torch.load(path, weights_only=True)
    rate = rate_of[content["plain"]["progress"]["step"]]
    twice = 2 if content["plain"]["config"]["preset"] == "original" else 1
    content["format"] = 1
    for name, velocity in content["tensors"]["momentum"].items():
        velocity.div_(-rate * (twice if name.endswith("bias") else 1))
    torch.save(content, path)
