"""Under torchrun, all processes restart after the death of one and continue from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint

OPTIONS = ["--width", "0.05", "--crop", "64", "--epochs", "1", "--batch-size", "50", "--seed", "5", "--devices", "cpu"]
OPTIONS += ["--workers", "1", "--log-every", "1", "--checkpoint-every", "2"]
STEPS, KILLED_IN, SAVED = 6, 4, 2

# The process of rank VICTIM kills itself in its fourth step, the first time that torchrun starts it; or, if SIGNAL is
# SIGTERM, has torchrun end all.
TRAINER = """
import os, signal
from trainer.data import feed
from trainer.cli import main
from trainer.optimizer import PaperSGD

update, start, steps = PaperSGD.step, feed.LocalNode.__init__, []

def update_and_end(self):
    update(self)
    steps.append(self)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (os.environ["VICTIM"], "0") and len(steps) == 4:
        number = int(os.environ["SIGNAL"])
        os.kill(os.getppid() if number == signal.SIGTERM else os.getpid(), number)

def start_and_tell(self, *args, **more):
    with open(os.environ["STARTED"], "a") as file:
        file.write(os.environ["RANK"])
    start(self, *args, **more)

PaperSGD.step, feed.LocalNode.__init__ = update_and_end, start_and_tell
main()
"""


def settings(folder: Path, victim: int = -1, number: int = signal.SIGKILL) -> dict[str, str]:
    """Return the variables that TRAINER reads."""
    given = {"VICTIM": str(victim), "SIGNAL": str(int(number)), "STARTED": str(folder / "started")}
    return given | {"OMP_NUM_THREADS": "1"}


def torchrun(
    folder: Path, processes: int, arguments: list[str | Path], victim: int = -1, number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    script = folder / "victim.py"
    script.write_text(TRAINER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += [f"--nproc-per-node={processes}", "--", str(script), "run"]
    command += [str(argument) for argument in [*arguments, *OPTIONS]]
    environ = os.environ | settings(folder, victim, number) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False, cwd=folder)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in log(folder) if row["event"] == "step"}


def ended(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


@pytest.mark.parametrize(("count", "victim"), [(2, 1), (4, 0)])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    processes: Any, dataset_dir: Path, tmp_path: Path, count: int, victim: int
) -> None:
    """After SIGKILL the others exit at once, and the result equals that of an undisturbed run, bit for bit."""
    command = ["run", "--data", dataset_dir, "--run", tmp_path / "unbroken", *OPTIONS]
    environ = settings(tmp_path) | {"TORCHELASTIC_RESTART_COUNT": "0"}
    for code, said in processes.together(count, TRAINER, *command, environ=environ):
        assert code == 0, said
    done = torchrun(tmp_path, count, ["--data", dataset_dir, "--run", tmp_path / "run"], victim)
    assert done.returncode == 0, done.stderr
    # torchrun's warning when a process has not left 30 s after SIGTERM; a clock here would measure the machine.
    assert "forcefully exiting" not in done.stderr, done.stderr
    assert done.stderr.count("trainer: another process of this run is gone") >= 1, done.stderr
    assert "    raise " not in done.stderr, done.stderr
    steps = [row["step"] for row in log(tmp_path / "run") if row["event"] in ("step", "resume")]
    assert steps == [*range(1, steps.index(SAVED, SAVED) + 1), *range(SAVED, STEPS + 1)]
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    end, expected = ended(tmp_path / "run"), ended(tmp_path / "unbroken")
    assert [name for name in expected.model if not torch.equal(end.model[name], expected.model[name])] == []
    assert [(account.expected, account.delivered) for account in end.plain.ledger] == [(300, 300)]
    assert (tmp_path / "started").read_text() == "000"  # one private node each time, however many replicas


def test_a_torchrun_that_is_ended_ends_in_order(dataset_dir: Path, tmp_path: Path) -> None:
    """After SIGTERM to torchrun every process saves a checkpoint of the current step and exits with 0."""
    done = torchrun(tmp_path, 2, ["--data", dataset_dir, "--run", tmp_path / "run"], 0, signal.SIGTERM)
    assert "SIGTERM" in done.stderr, "torchrun tells of it, and ends with 1 itself"
    stopped = log(tmp_path / "run")[-1]
    assert stopped["event"] == "stop"
    assert KILLED_IN <= ended(tmp_path / "run").plain.progress.step == stopped["step"] < STEPS
    assert f"Stopped at step {stopped['step']}" in done.stdout
    assert "another process" not in done.stderr


def test_another_launchs_run_is_not_gone_on_with(dataset_dir: Path, tmp_path: Path) -> None:
    """A folder in use is refused at the first start and again after torchrun's restart."""
    (tmp_path / "run").mkdir()
    about = '{"config": {}, "launch": "another"}'
    (tmp_path / "run" / "config.json").write_text(about)
    done = torchrun(tmp_path, 2, ["--data", dataset_dir, "--run", tmp_path / "run"])
    assert done.returncode != 0
    assert done.stderr.count("it is not empty; choose another") == 2
    assert (tmp_path / "run" / "config.json").read_text() == about
