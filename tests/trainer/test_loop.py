"""Faults during training: full disks, too little memory, lost nodes; and the log of a sound run."""

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
from click.testing import CliRunner, Result

from trainer.cli import main
from trainer.data.feed import DeviceBatch
from trainer.errors import CheckpointError
from trainer.model.alexnet import AlexNet
from trainer.model.dropout import DrawnMasks
from trainer.model.rng import DropoutKey
from trainer.parallel import devices
from trainer.run import checkpoint, divergence
from trainer.run.checkpoint import Checkpoint
from trainer.run.folder import RunFolder
from trainer.run.progress import StepRecord

SMALL = ["--width", "0.05", "--crop", "64", "--epochs", "1", "--batch-size", "64", "--devices", "cpu"]
SMALL += ["--log-every", "1"]
STEPS = 5


def run(node: str, folder: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["run", "--loader", node, "--run", str(folder), *SMALL, *more])


def log(folder: Path, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def test_it_tells_of_speed_and_layers(node: str, tmp_path: Path) -> None:
    """Each log line has the MFU against the given peak, and mean |w|, mean |dw| and ratio of every parameter."""
    result = run(node, tmp_path / "run", "--peak-tflops", "0.5", "--deterministic")
    assert result.exit_code == 0, result.output
    steps, layers = log(tmp_path / "run", "step"), log(tmp_path / "run", "layers")
    assert [row["step"] for row in steps] == [row["step"] for row in layers] == list(range(1, STEPS + 1))
    assert all(0 < row["mfu"] < 10 for row in steps)
    assert steps[0]["mfu"] / steps[1]["mfu"] == pytest.approx(steps[0]["images_per_s"] / steps[1]["images_per_s"])
    assert len(layers[0]["parameters"]) == 2 * (2 * 7 + 1)
    mean_w, mean_dw, ratio = layers[0]["parameters"]["towers.1.conv1.weight"]
    assert ratio == pytest.approx(mean_dw / mean_w, rel=1e-2)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["deterministic"] is True


def test_it_tells_where_the_time_went(node: str, tmp_path: Path) -> None:
    """Each log line and each validation has the seconds of every phase; together they are the time of the run's steps."""
    assert run(node, tmp_path / "run").exit_code == 0
    rows = log(tmp_path / "run", "time")
    assert [(row["step"], row["steps"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (5, 0)]
    assert rows[0]["seconds"].keys() >= {"waiting", "copy", "forward", "exchange", "backward", "update"}
    assert rows[-1]["seconds"].keys() >= {"validating", "saving"}
    for row, step in zip(rows, log(tmp_path / "run", "step"), strict=False):
        images = 64 if row["step"] < STEPS else 300 - 4 * 64
        within = sum(s for phase, s in row["seconds"].items() if phase != "other")
        assert within <= 1.01 * images / step["images_per_s"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_batch_brings_its_masks(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """No step draws masks of its own: not after an epoch's short last update, nor after a resume within an epoch."""
    plain, asked = DeviceBatch.dropout, []

    def dropout(batch: DeviceBatch, key: DropoutKey) -> DropoutKey:
        masks = plain(batch, key)
        asked.append((key.step, key.first, isinstance(masks, DrawnMasks)))
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return masks

    monkeypatch.setattr(DeviceBatch, "dropout", dropout)
    options = ["--batch-size", "50", "--accumulate", str(accumulate), "--epochs", "2"]
    assert run(node, tmp_path / "run", *options).exit_code == 0
    assert ended(tmp_path / "run").plain.progress.step == (1 if accumulate == 4 else 5)
    assert run(node, tmp_path / "run", *options, "--resume", "auto").exit_code == 0
    assert all(came for _, _, came in asked)
    places = [(step, first) for step, first, _ in asked]
    if accumulate == 1:
        assert places == [(step, 0) for step in range(12)]
    else:  # the second update is given up by the stop, and begins again
        epoch = [(0, 0), (0, 50), (0, 100), (0, 150), (1, 0), (1, 50)]
        assert places == [*epoch[:5], *epoch[4:], *((step + 2, first) for step, first in epoch)]


def test_a_few_steps_are_profiled(node: str, tmp_path: Path) -> None:
    """--profile writes a trace of that many steps, which says how to open it; a resume does not profile again."""
    folder = tmp_path / "run"
    result = run(node, folder, "--profile", "1")
    assert result.exit_code == 0, result.output
    assert "ui.perfetto.dev" in result.output
    names = [event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]
    assert names.count("_LocalResponseNormBackward") == 2 * 2  # two towers with two normalisations each
    (folder / "trace.json").unlink()
    assert run(node, folder, "--resume", "auto", "--epochs", "2").exit_code == 0
    assert not (folder / "trace.json").exists()


def test_deterministic_holds_while_training(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--deterministic changes torch's settings during training; without it they stay."""
    forward, seen = AlexNet.forward, []

    def forward_and_look(self: AlexNet, *given: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(self, *given)

    monkeypatch.setattr(AlexNet, "forward", forward_and_look)
    for option, expected in (("--deterministic", True), ("--epochs=1", False)):
        seen.clear()
        assert run(node, tmp_path / option, option).exit_code == 0
        assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("options", "divisor"),
    [(["--preset", "original"], 1.1), (["--preset", "original", "--no-jitter"], 1.0), (["--preset", "paper"], 1.0)],
    ids=["original", "original without jitter", "paper"],
)
def test_jittered_inputs_of_the_original_are_divided(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], divisor: float
) -> None:
    """``original`` divides training inputs by 1.1 where there is jitter; validation inputs are never divided.

    Pixels are whole numbers and the mean image has sixteenths, so undivided inputs are whole sixteenths.
    """
    forward, seen = AlexNet.forward, {True: [], False: []}

    def forward_and_look(self: AlexNet, images: Any, *more: Any) -> Any:
        seen[self.training].append(images[0].clone())
        return forward(self, images, *more)

    monkeypatch.setattr(AlexNet, "forward", forward_and_look)
    result = run(node, tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    for training, factor in ((True, divisor), (False, 1.0)):
        sixteenths = torch.cat(seen[training]) * (16 * factor)
        torch.testing.assert_close(sixteenths, sixteenths.round(), rtol=0, atol=1e-2)
        assert (torch.cat(seen[training]) * 16 == sixteenths.round()).all() == (factor == 1.0)


def test_a_training_that_does_not_start_is_warned_of(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose loss stays at ln(classes) says so once, on the console and in the log."""
    monkeypatch.setattr(divergence, "STARTED_BY", 3)
    result = run(node, tmp_path / "run", "--lr", "1e-9", "--no-dropout")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("is not below that of guessing, ln 3 = 1.10. What helps: ") == 1
    (told,) = log(tmp_path / "run", "not-started")
    assert told["step"] == 3
    assert told["loss"] > 1.0


def ended(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def test_accumulated_batches_are_one_batch(node: str, tmp_path: Path) -> None:
    """Four batches of 16 per update, three at the epoch's end, train like batches of 64, dropout included."""
    parts = ["--batch-size", "16", "--accumulate", "4"]
    for folder, options in (("whole", []), ("parts", parts)):
        result = run(node, tmp_path / folder, *options)
        assert result.exit_code == 0, result.output
    whole, accumulated = ended(tmp_path / "whole"), ended(tmp_path / "parts")
    for name, weights in whole.model.items():
        torch.testing.assert_close(accumulated.model[name], weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(accumulated.momentum[name], whole.momentum[name], rtol=1e-2, atol=1e-7)
    assert accumulated.plain.loader == whole.plain.loader
    assert accumulated.plain.ledger == whole.plain.ledger
    rows = [[(row["step"], row["seen"]) for row in log(tmp_path / folder, "step")] for folder in ("whole", "parts")]
    assert rows[0] == rows[1] == [(1, 64), (2, 128), (3, 192), (4, 256), (5, 300)]


def test_a_stop_within_an_update_gives_it_up(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM after the second of four batches saves the state before them; the resume ends like an unbroken run."""
    options = ["--batch-size", "16", "--accumulate", "4"]
    assert run(node, tmp_path / "unbroken", *options).exit_code == 0
    forward, calls = AlexNet.forward, []

    def forward_and_stop(self: AlexNet, *given: Any) -> Any:
        calls.append(len(given[0][0]))
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *given)

    monkeypatch.setattr(AlexNet, "forward", forward_and_stop)
    assert run(node, tmp_path / "run", *options).exit_code == 0
    assert (len(calls), ended(tmp_path / "run").plain.progress.seen) == (6, 64)
    result = run(node, tmp_path / "run", *options, "--resume", "auto")
    assert result.exit_code == 0, result.output
    end, expected = ended(tmp_path / "run"), ended(tmp_path / "unbroken")
    assert [name for name in end.model if not torch.equal(end.model[name], expected.model[name])] == []
    assert end.plain.history == expected.plain.history
    assert [(account.expected, account.delivered) for account in end.plain.ledger] == [(300, 300)]


def test_a_full_disk_ends_no_training(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed checkpoint is reported on the console and in the log, and the next one is written."""
    save, tried = checkpoint.save, []

    def full_at_first(folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        tried.append(whole.plain.progress.step)
        if len(tried) == 1:
            raise CheckpointError(folder, "it cannot be written (No space left on device)")
        return save(folder, whole, is_best)

    monkeypatch.setattr(checkpoint, "save", full_at_first)
    result = run(node, tmp_path / "run", "--checkpoint-every", "2")
    assert result.exit_code == 0, result.output
    assert tried == [2, 4, 5]
    assert "Not saved: " in result.stdout
    assert "No space left" in log(tmp_path / "run", "not-saved")[0]["reason"]
    assert len(checkpoint.saved(tmp_path / "run" / "checkpoints")) == 2


def test_the_last_checkpoint_must_be_written(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose last checkpoint fails ends with an error."""

    def full(folder: Path, whole: Checkpoint, is_best: bool) -> Path:
        raise CheckpointError(folder, "it cannot be written (No space left on device)")

    monkeypatch.setattr(checkpoint, "save", full)
    result = run(node, tmp_path / "run")
    assert result.exit_code == 3
    assert "No space left on device" in result.stderr


def test_memory_that_is_too_small_is_said_with_what_would_fit(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for 20 images, a batch of 64 is refused and 16, a multiple of 8, recommended."""
    forward = AlexNet.forward
    images: list[int] = []

    def forward_if_it_fits(self: AlexNet, given: Any, *more: Any) -> Any:
        images.append(len(given[0]))
        if images[-1] > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(self, given, *more)

    def peak(_: torch.device, trial: Any, count: int) -> int:
        trial(count)
        return 100 * images[-1]

    monkeypatch.setattr(AlexNet, "forward", forward_if_it_fits)
    monkeypatch.setattr(devices, "peak_bytes", peak)
    monkeypatch.setattr(devices, "available_bytes", lambda _: 2000)
    result = run(node, tmp_path / "run")
    assert result.exit_code == 5
    assert "too small for a batch of 64 images; about 16 images would fit: try --batch-size 16" in result.stderr
    assert images == [64, 4, 8]
    assert "Traceback" not in result.output


def test_a_node_that_goes_away_and_comes_back(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run waits for its node and continues; each sample is seen exactly once."""
    address, nodes, append = f"ipc://{tmp_path}/node", [], RunFolder.append

    def start() -> None:
        command = [sys.executable, "-m", "loader_service", "start", "--data", str(dataset_dir), "--workers", "1"]
        nodes.append(subprocess.Popen([*command, "--bind", address, "--quiet"], stderr=subprocess.DEVNULL))

    def append_and_kill(self: RunFolder, record: Any) -> None:
        append(self, record)
        if isinstance(record, StepRecord) and record.step == 2:
            nodes[0].kill()
            nodes[0].wait()
            start()

    monkeypatch.setattr(RunFolder, "append", append_and_kill)
    start()
    try:
        result = run(address, tmp_path / "run", "--batch-size", "16", "--timeout", "60")
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    assert result.exit_code == 0, result.output
    assert len(nodes) == 2
    ledger = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
    assert [(account["expected"], account["delivered"]) for account in ledger] == [(300, 300)]
