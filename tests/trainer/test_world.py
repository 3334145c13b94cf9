"""One process for each tower: the same run as in one process. For replicas see test_layouts.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.cli import main

OPTIONS = ["--width", "0.05", "--epochs", "1", "--batch-size", "64", "--seed", "5", "--devices", "cpu"]
OPTIONS += ["--log-every", "1", "--checkpoint-every", "2"]


def torchrun(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += map(str, arguments)
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100, check=False
    )


def ended(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def alone(node: str, folder: Path, *more: str) -> Path:
    """The same run in one process."""
    result = CliRunner().invoke(main, ["run", "--loader", node, "--run", str(folder), *OPTIONS, *more])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def one_process(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(node, tmp_path_factory.mktemp("alone") / "run")


def assert_same_run(folder: Path, other: Path) -> None:
    """The same losses within float32's tolerance; tensors too, but for pooling's and ReLU's close decisions.

    Sums in another order differ by 1e-6; a maximum that is so decided otherwise changes a layer's gradient by a percent.
    A gradient counted twice, or not at all, would be out by half or more.
    """
    assert losses(folder) == pytest.approx(losses(other), rel=1e-5)
    end, expected = ended(folder), ended(other)
    for tensors, others in ((end.model, expected.model), (end.momentum, expected.momentum)):
        assert tensors.keys() == others.keys()
        far = {name: float((tensor - others[name]).norm() / others[name].norm()) for name, tensor in tensors.items()}
        assert {name: distance for name, distance in far.items() if not distance < 0.05} == {}
    assert end.plain.progress.seen == expected.plain.progress.seen
    assert summary(folder)["accuracy"] == pytest.approx(summary(other)["accuracy"], abs=0.04)
    assert [(account.expected, account.delivered) for account in end.plain.ledger] == [(300, 300)]


def test_a_process_for_each_tower(node: str, one_process: Path, tmp_path: Path) -> None:
    """Two gloo processes learn what one does, dropout included; the one checkpoint has both towers."""
    done = torchrun(2, "-m", "--", "trainer", "run", "--loader", node, "--run", tmp_path / "run", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", one_process)


def test_a_process_for_each_tower_in_bfloat16(node: str, tmp_path: Path) -> None:
    """Maps cross between the processes in bfloat16; losses are those of one process that runs the same fast forms."""
    fast = ["--amp", "bf16", "--fused-norm"]
    done = torchrun(2, "-m", "--", "trainer", "run", "--loader", node, "--run", tmp_path / "run", *OPTIONS, *fast)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(alone(node, tmp_path / "alone", *fast)), rel=1e-3)
