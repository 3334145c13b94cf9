"""A process for each tower, and replicas of such pairs, learn the same as one process.

For runs that resume in other layouts see test_layouts.py. As a program, this file is one of several processes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from trainer.cli import main
from trainer.config import RunConfig, Source
from trainer.data.feed import open_source
from trainer.loop import train
from trainer.model.ablation import Ablation
from trainer.model.speed import REFERENCE, Speed
from trainer.parallel.world import join, leave
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint
from trainer.run.folder import RunFolder
from trainer.stop import StopRequest

OPTIONS = ["--width", "0.05", "--epochs", "1", "--batch-size", "64", "--seed", "5", "--devices", "cpu"]
OPTIONS += ["--log-every", "1", "--checkpoint-every", "2"]


def ended(folder: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.saved(folder / "checkpoints")[-1])


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def alone(node: str, folder: Path, *more: str) -> Path:
    """Make the same run in one process."""
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


def test_a_process_for_each_tower(processes: Any, node: str, one_process: Path, tmp_path: Path) -> None:
    """Two gloo processes learn the same as one, with dropout; their checkpoint has both towers."""
    command = ["run", "--loader", node, "--run", tmp_path / "run", *OPTIONS]
    for code, said in processes.together(2, "from trainer.cli import main; main()", *command):
        assert code == 0, said
    assert_same_run(tmp_path / "run", one_process)


FORMS = {
    "bf16": Speed(amp="bf16"),
    "contiguous": Speed(channels_last=False),
    "fused-norm": Speed(fused_norm=True),
    "unfused-sgd": Speed(fused_sgd=False),
    "bf16-fused": Speed(amp="bf16", fused_norm=True),
}
COMPILED = {"compiled": Speed(compile=True, fused_norm=True)} if any(map(shutil.which, ("g++", "clang++"))) else {}


def configs(node: str, replicas: int, speeds: dict[str, Speed]) -> dict[str, RunConfig]:
    """Return runs of five short steps in each form, and one by accumulation, with a moving average. Replicas draw different masks, so they run without dropout."""
    plain = RunConfig(
        width=0.05,
        crop=64,
        epochs=1,
        batch_size=64,
        seed=5,
        devices=("cpu",),
        checkpoint_every=0,
        log_every=1,
        source=Source(loader=node),
        ablation=Ablation(dropout=replicas == 1),
    )
    accumulated = {"accumulated": msgspec.structs.replace(plain, batch_size=16, accumulate=4, ema=0.5)}
    return {name: msgspec.structs.replace(plain, speed=speed) for name, speed in speeds.items()} | accumulated


def train_each(runs: dict[str, RunConfig], parent: Path) -> None:
    """Train all runs one after the other, in the processes that the environment names."""
    with join(("cpu",), 2) as world, StopRequest() as stop:
        for name, config in runs.items():
            folder = RunFolder.create(parent / name, parent) if world.is_first else RunFolder(parent / name)
            with open_source(config.source) as node:
                train(config, folder, node if world.has_head else None, Console(quiet=True), stop, None, world)
    leave(world)


def assert_same_form(folder: Path, plain: Path, own: Path) -> None:
    """Losses are the plain form's, as exactly as the form is, and one process's of the same form; so are sums of gradients.

    Not so bfloat16's gradients of replicas, whose small parts are rounded otherwise than the whole.
    """
    narrow = plain != own
    assert losses(folder) == pytest.approx(losses(plain), rel=2e-2 if narrow else 1e-5)
    assert losses(folder) == pytest.approx(losses(own), rel=1e-3)
    if narrow:
        assert losses(folder) != pytest.approx(losses(plain), rel=1e-5)
    else:
        momentum, expected = ended(folder).momentum, ended(own).momentum
        far = {name: float((momentum[name] - sums).norm() / sums.norm()) for name, sums in expected.items()}
        assert {name: distance for name, distance in far.items() if not distance < 0.05} == {}


@pytest.mark.parametrize(
    ("count", "speeds"),
    [(2, FORMS), (4, FORMS), pytest.param(4, COMPILED, marks=pytest.mark.long)],
    ids=["a tower each", "replicas", "compiled replicas"],
)
def test_faster_forms_in_company(
    processes: Any, node: str, tmp_path: Path, count: int, speeds: dict[str, Speed]
) -> None:
    """Each form learns the same as one plain process, with a process for each tower and as replicas."""
    alone, parent = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    parent.mkdir()
    narrow = {name: speed for name, speed in FORMS.items() if speed.amp == "bf16"}
    train_each(configs(node, count // 2, {"plain": REFERENCE} | narrow), alone)
    runs = msgspec.json.encode(configs(node, count // 2, speeds)).decode()
    for code, said in processes.together(count, Path(__file__).read_text(encoding="utf-8"), runs, parent):
        assert code == 0, said
    average, expected = ended(parent / "accumulated").ema, ended(alone / "accumulated").ema
    assert average.keys() == expected.keys() == ended(parent / "accumulated").model.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(average[name], weights, rtol=1e-3, atol=1e-5)
    for name in (*speeds, "accumulated"):
        assert_same_form(parent / name, alone / "plain", alone / (name if name in narrow else "plain"))


if __name__ == "__main__":
    train_each(msgspec.json.decode(sys.argv[1], type=dict[str, RunConfig]), Path(sys.argv[2]))
