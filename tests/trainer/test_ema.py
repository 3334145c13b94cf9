"""The moving average of the weights: its rule, its validation, and its place in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from trainer.cli import main
from trainer.ema import MovingAverage

OPTIONS = ["--width", "0.05", "--crop", "64", "--epochs", "2", "--batch-size", "64", "--devices", "cpu", "--lr", "0.02"]


def trainer(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_average_follows_its_rule() -> None:
    """a <- d a + (1 - d) w, with d at most (1 + step) / (10 + step)."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    model.weight.data.fill_(1.0)
    average, expected = MovingAverage(model, 0.2), 1.0
    for step in range(1, 6):
        model.weight.data.fill_(1.0 + step)
        average.update(step)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (1.0 + step)
    assert average.weights()["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_the_weights_come_back_after_its_use() -> None:
    """Inside ``in_use`` the network has the average, in the same memory; afterwards its own weights."""
    model = nn.Linear(3, 3)
    average, memory = MovingAverage(model, 0.9), model.weight.data_ptr()
    first = model.weight.detach().clone()
    model.weight.data.add_(1.0)
    own = model.weight.detach().clone()
    with average.in_use():
        assert torch.equal(model.weight, first)
    assert torch.equal(model.weight, own)
    assert model.weight.data_ptr() == memory


def test_a_run_validates_and_saves_both(node: str, tmp_path: Path) -> None:
    """The log has the validation of weights and average; ``evaluate`` and ``evaluate --ema`` agree with it."""
    result = trainer("run", "--loader", node, "--run", tmp_path / "run", *OPTIONS, "--ema", "0.9")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["event"] == "epoch"][-1]
    assert "averaged weights: " in result.stdout
    assert last["ema_val_loss"] != last["val_loss"]
    for options, name in (([], "val_loss"), (["--ema"], "ema_val_loss")):
        result = trainer("evaluate", tmp_path / "run", "--loader", node, "--json", *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["loss"] == pytest.approx(last[name], rel=1e-5)


def test_runs_without_an_average_say_so(node: str, tmp_path: Path) -> None:
    """``evaluate --ema`` refuses a checkpoint without an average; --ema needs a number between 0 and 1."""
    refused = trainer("run", "--loader", node, "--run", tmp_path / "run", *OPTIONS, "--ema", "1")
    assert (refused.exit_code, "--ema=1.0 cannot work" in refused.stderr) == (2, True)
    result = trainer("run", "--loader", node, "--run", tmp_path / "run", *OPTIONS)
    assert result.exit_code == 0, result.output
    refused = trainer("evaluate", tmp_path / "run", "--loader", node, "--ema")
    assert (refused.exit_code, "has no moving average of the weights" in refused.stderr) == (3, True)
