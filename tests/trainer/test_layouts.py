"""A run resumes with other numbers of processes: one, one for each tower, replicas of such pairs, and one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trainer.cli import main
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint

OPTIONS = ["--width", "0.05", "--crop", "64", "--epochs", "2", "--batch-size", "64", "--seed", "5"]
OPTIONS += ["--no-dropout", "--log-every", "1", "--checkpoint-every", "0"]  # replicas drop units of their own
LEGS = ((1, "cpu", 2), (2, "cpu", 4), (4, "cpu", 7), (1, "cpu,cpu", 10))
"""Processes, their devices, and the step after which they are stopped, in the middle of an epoch."""

# Asks for an end, as Ctrl-C does, when the step that is named has been logged.
STOP_AT_STEP = """
import os, signal, sys
from trainer.cli import main
from trainer.run.progress import StepRecord
from trainer.run.folder import RunFolder

last, append = int(sys.argv.pop()), RunFolder.append

def append_and_end(self, record):
    append(self, record)
    if isinstance(record, StepRecord) and record.step == last:
        os.kill(os.getpid(), signal.SIGTERM)

RunFolder.append = append_and_end
main()
"""


def leg(processes: Any, node: str, folder: Path, count: int, devices: str, last: int) -> None:
    """Continue the run until step ``last`` in several processes."""
    command = ["run", "--loader", node, "--run", folder, "--resume", "auto", *OPTIONS, "--devices", devices, str(last)]
    for code, said in processes.together(count, STOP_AT_STEP, *command):
        assert code == 0, said


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def ended(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def test_a_run_goes_on_in_any_layout(processes: Any, node: str, tmp_path: Path) -> None:
    """Losses and weights are those of one uninterrupted process up to rounding, and the ledger has each sample once."""
    for count, devices, last in LEGS:
        leg(processes, node, tmp_path / "run", count, devices, last)
    alone = CliRunner().invoke(
        main, ["run", "--loader", node, "--run", str(tmp_path / "alone"), *OPTIONS, "--devices", "cpu"]
    )
    assert alone.exit_code == 0, alone.output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    end, expected = ended(tmp_path / "run"), ended(tmp_path / "alone")
    assert end.plain.progress.step == expected.plain.progress.step == 10
    far = {name: float((end.model[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.model.items()}
    assert {name: distance for name, distance in far.items() if not distance < 0.01} == {}
    accounts = [(account.epoch, account.expected, account.delivered) for account in end.plain.ledger]
    assert accounts == [(0, 300, 300), (1, 300, 300)]
