"""A run that was stopped or killed within an epoch ends, after a resume, like one that was never stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from trainer.cli import main
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint

EPOCHS, STEPS_PER_EPOCH, RECORDS = 2, 10, 300
OPTIONS = [
    "--width",
    "0.05",
    "--crop",
    "64",
    "--epochs",
    str(EPOCHS),
    "--batch-size",
    "32",
    "--seed",
    "5",
    "--devices",
    "cpu",
]
OPTIONS += ["--checkpoint-every", "4", "--log-every", "1"]

# Ends itself by a real signal, after the step that is asked for has been logged.
END_AT_STEP = """
import os, signal, sys
from trainer.cli import main
from trainer.run.progress import StepRecord
from trainer.run.folder import RunFolder

last, number = int(sys.argv.pop()), int(sys.argv.pop())
append = RunFolder.append

def append_and_end(self, record):
    append(self, record)
    if isinstance(record, StepRecord) and record.step == last:
        os.kill(os.getpid(), number)

RunFolder.append = append_and_end
main()
"""


def run_to_the_end(node: str, folder: Path, *more: str) -> Checkpoint:
    result = CliRunner().invoke(main, ["run", "--loader", node, "--run", str(folder), *OPTIONS, *more])
    assert result.exit_code == 0, result.output
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def run_until(processes: Any, node: str, folder: Path, number: signal.Signals, step: int) -> tuple[int | None, str]:
    """Return the exit code and the output of a run that ends itself by a signal."""
    command = ["run", "--loader", node, "--run", folder, *OPTIONS, str(int(number)), str(step)]
    ended: tuple[int | None, str] = processes.start(END_AT_STEP, *command).wait()
    return ended


def steps_logged(folder: Path) -> list[int]:
    return [row["step"] for row in log(folder) if row["event"] == "step"]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(node: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return the last checkpoint of a run that was never stopped."""
    return run_to_the_end(node, tmp_path_factory.mktemp("unbroken") / "run")


def assert_same_end(one: Checkpoint, other: Checkpoint) -> None:
    """Compare weights and momentum bit for bit, and counters, schedule, position and history."""
    for tensors, others in ((one.model, other.model), (one.momentum, other.momentum)):
        assert tensors.keys() == others.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert one.plain.progress.step == other.plain.progress.step == EPOCHS * STEPS_PER_EPOCH
    assert one.plain.schedule == other.plain.schedule
    assert one.plain.loader == other.plain.loader
    assert one.plain.history == other.plain.history


def assert_each_sample_once(end: Checkpoint) -> None:
    accounts = [(account.epoch, account.expected, account.delivered) for account in end.plain.ledger]
    assert accounts == [(epoch, RECORDS, RECORDS) for epoch in range(EPOCHS)]


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, 13], ids=["first epoch", "before validation", "second epoch"])
def test_stopped_by_sigterm(processes: Any, node: str, tmp_path: Path, unbroken: Checkpoint, step: int) -> None:
    """A stopped run saves and exits with 0; its resume trains on the rest, even if only the validation remains."""
    code, said = run_until(processes, node, tmp_path / "run", signal.SIGTERM, step)
    assert code == 0, said
    assert steps_logged(tmp_path / "run")[-1] == step
    end = run_to_the_end(node, tmp_path / "run", "--resume", "auto")
    assert steps_logged(tmp_path / "run") == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert_each_sample_once(end)
    assert_same_end(end, unbroken)


def test_killed_after_a_checkpoint(processes: Any, node: str, tmp_path: Path, unbroken: Checkpoint) -> None:
    """The two steps between the checkpoint and SIGKILL are repeated and counted once."""
    code, _ = run_until(processes, node, tmp_path / "run", signal.SIGKILL, 6)
    assert code == -signal.SIGKILL
    end = run_to_the_end(node, tmp_path / "run", "--resume", "auto")
    assert steps_logged(tmp_path / "run") == [*range(1, 7), *range(5, EPOCHS * STEPS_PER_EPOCH + 1)]
    assert_each_sample_once(end)
    assert_same_end(end, unbroken)


def test_killed_before_the_first_checkpoint(processes: Any, node: str, tmp_path: Path, unbroken: Checkpoint) -> None:
    """Without a checkpoint the same command starts over in the same folder."""
    code, _ = run_until(processes, node, tmp_path / "run", signal.SIGKILL, 2)
    assert code == -signal.SIGKILL
    assert_same_end(run_to_the_end(node, tmp_path / "run", "--resume", "auto"), unbroken)
