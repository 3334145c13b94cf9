"""The trainer's commands: their results, and one sentence for each deliberate error."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

from loader_service import LocalNode
from trainer.cli import main
from trainer.data import feed
from trainer.run import checkpoint
from trainer.run.folder import RunFolder, find_checkpoint
from trainer.run.progress import StepRecord

SMALL = ["--width", "0.05", "--crop", "64", "--epochs", "2", "--batch-size", "64", "--devices", "cpu"]
SMALL += ["--log-every", "2"]
EXPLOSIVE = ["--crop", "224", "--lr", "0.99", "--preset", "original"]


def trainer(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, exit_code: int, sentence: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert sentence in result.stderr
    assert isinstance(result.exception, SystemExit)  # no traceback


@pytest.fixture(scope="module")
def run(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = trainer("run", "--loader", node, "--run", folder, *SMALL)
    assert result.exit_code == 0, result.output
    return folder


def summary(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return read


def summary_steps(run: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    return checkpoint.load(checkpoint.saved(run / "checkpoints")[-1]).plain.progress.step


def test_a_run_leaves_what_it_says(run: Path) -> None:
    """Summary, log, checkpoint and figures are at the paths that the summary names."""
    made = summary(run)
    assert made["finished"]
    assert made["chance"] == pytest.approx(1 / 3)
    assert 0 <= made["accuracy"] <= made["best_accuracy"] <= 1
    assert made["images_per_s"] > 0
    assert 0 <= made["waiting_share"] <= 1
    assert all(Path(path).stat().st_size for path in [made["checkpoint"], made["log"], *made["figures"]])


def test_every_sample_was_seen_exactly_once(run: Path) -> None:
    """Each epoch's account has as many samples delivered as expected."""
    ledger = summary(run)["ledger"]
    assert [(account["epoch"], account["expected"], account["delivered"]) for account in ledger] == [
        (0, 300, 300),
        (1, 300, 300),
    ]
    assert {"duplicates_refused", "reassigned", "substituted"} <= ledger[0].keys()


def test_the_log_tells_steps_and_epochs(run: Path) -> None:
    """The log has one JSON object per line, from start to end."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start"
    assert rows[-1]["event"] == "end"
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == [2, 4, 5, 6, 8, 10]
    assert {"loss", "error", "lr", "images_per_s", "waiting"} <= steps[0].keys()
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [0, 1]


def test_evaluate_agrees_with_the_last_validation(node: str, run: Path) -> None:
    """The newest checkpoint gives the accuracy of the summary, on centre crops and as JSON."""
    result = trainer("evaluate", run, "--loader", node, "--batch-size", "32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 60
    assert 1 - found["top1_error"] == pytest.approx(summary(run)["accuracy"])


def test_evaluate_takes_the_best_checkpoint(node: str, run: Path, tmp_path: Path) -> None:
    """--best evaluates best.pt of a folder, not the newest checkpoint."""
    (tmp_path / "checkpoints").mkdir()
    newest = checkpoint.load(find_checkpoint(run))
    checkpoint.save(tmp_path / "checkpoints", newest, is_best=True)
    for weights in newest.model.values():
        weights.zero_()
    newest.plain.progress.step += 1
    checkpoint.save(tmp_path / "checkpoints", newest, is_best=False)
    losses = {}
    for option in ([], ["--best"]):
        result = trainer("evaluate", tmp_path, "--loader", node, "--json", *option)
        assert result.exit_code == 0, result.output
        losses[bool(option)] = json.loads(result.stdout)["loss"]
    assert losses[False] == pytest.approx(math.log(3), rel=1e-6)  # all weights are 0: guessing
    assert losses[True] != pytest.approx(math.log(3), rel=1e-6)


def test_evaluate_several_runs_with_ten_crops(node: str, run: Path) -> None:
    """A run averaged with itself gives its own errors; a checkpoint file works like its folder."""
    once = trainer("evaluate", run, "--loader", node, "--views", "ten-crop", "--json")
    twice = trainer("evaluate", run, summary(run)["checkpoint"], "--loader", node, "--views", "ten-crop", "--json")
    assert once.exit_code == twice.exit_code == 0, once.output + twice.output
    one, both = json.loads(once.stdout), json.loads(twice.stdout)
    assert one.pop("loss") == pytest.approx(both.pop("loss"))
    assert one == both


def test_evaluate_says_it_in_words(node: str, run: Path) -> None:
    """Without --json, evaluate prints one line."""
    result = trainer("evaluate", run, "--loader", node)
    assert result.stdout.startswith("60 images, center: top-1 error ")
    assert len(result.stdout.splitlines()) == 1


def test_evaluate_tells_of_each_class(node: str, run: Path) -> None:
    """Errors by class and confusion matrix add up to the total, in JSON and as tables."""
    found = json.loads(trainer("evaluate", run, "--loader", node, "--json").stdout)
    assert [(each["name"], each["images"]) for each in found["classes"]] == [("ant", 20), ("bee", 20), ("cat", 20)]
    assert [sum(row) for row in found["confusion"]] == [20, 20, 20]
    wrong = 20 * sum(each["top1_error"] for each in found["classes"])
    assert wrong == pytest.approx(60 * found["top1_error"])
    shown = trainer("evaluate", run, "--loader", node, "--classes").stdout
    assert "Confusion" in shown
    assert all(name in shown for name in ("0 ant", "1 bee", "2 cat"))


def test_evaluate_draws_what_is_taken_for_what(node: str, run: Path, tmp_path: Path) -> None:
    """--figure writes the confusion matrix; a missing folder is an error before the evaluation starts."""
    figure = tmp_path / "confusion.svg"
    assert trainer("evaluate", run, "--loader", node, "--figure", figure).exit_code == 0
    assert "bee" in figure.read_text()
    refused = trainer("evaluate", run, "--loader", node, "--figure", tmp_path / "no" / "confusion.svg")
    assert refused.exit_code != 0
    assert "a file in an existing folder" in refused.stderr


def test_predict(run: Path, tmp_path: Path) -> None:
    """predict takes any image file and prints the classes in falling order of probability."""
    Image.new("RGB", (300, 400), (200, 10, 10)).save(tmp_path / "red.png")
    result = trainer("predict", run, tmp_path / "red.png", "--json")
    assert result.exit_code == 0, result.output
    prediction = json.loads(result.stdout)
    probabilities = [guess["probability"] for guess in prediction["guesses"]]
    assert {guess["name"] for guess in prediction["guesses"]} == {"ant", "bee", "cat"}
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert probabilities == sorted(probabilities, reverse=True)
    assert "red.png" in trainer("predict", run, tmp_path / "red.png").stdout


def test_export(run: Path, tmp_path: Path) -> None:
    """The safetensors file has both towers' kernels and the mean image; an existing file is not overwritten."""
    target = tmp_path / "net.safetensors"
    assert trainer("export", run, target).exit_code == 0
    tensors = load_file(target)
    state = checkpoint.load(Path(summary(run)["checkpoint"])).model
    both = torch.cat([state["towers.0.conv1.weight"], state["towers.1.conv1.weight"]])
    assert torch.equal(tensors["conv1.weight"], both)
    assert tensors["mean"].shape == (256, 256, 3)
    assert_refused(trainer("export", run, target), 3, "the file exists already")


def test_a_run_folder_is_never_overwritten(node: str, run: Path) -> None:
    """A second run in the same folder is refused, and the error says how to continue the first."""
    before = summary(run)
    assert_refused(trainer("run", "--loader", node, "--run", run, *SMALL), 3, "it is not empty; choose another")
    assert summary(run) == before


def test_a_resumed_run_keeps_its_network(node: str, run: Path) -> None:
    """A resume refuses options that the weights depend on."""
    result = trainer("run", "--loader", node, "--run", run, "--resume", "auto", "--width", "0.5")
    assert_refused(result, 2, "--width=0.5 cannot work: expected 0.05, as in the run that continues from")


def test_a_finished_run_can_be_given_more_epochs(node: str, tmp_path: Path) -> None:
    """--resume auto with a larger --epochs trains the rest; with the same --epochs nothing remains."""
    for epochs, expected in (("1", 5), ("1", 5), ("2", 10)):
        options = ["--loader", node, "--run", tmp_path / "run", "--resume", "auto", *SMALL, "--epochs", epochs]
        assert trainer("run", *options).exit_code == 0
        assert summary(tmp_path / "run")["steps"] == expected


def test_new_runs_go_under_runs(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --run the folder is named by the time; --resume auto finds it."""
    monkeypatch.chdir(tmp_path)
    assert trainer("run", "--loader", node, *SMALL, "--epochs", "1").exit_code == 0
    (made,) = Path("runs").iterdir()
    assert trainer("run", "--loader", node, "--resume", "auto", "--epochs", "2").exit_code == 0
    assert list(Path("runs").iterdir()) == [made]
    assert summary(made)["epochs"] == 2


def test_a_loss_that_explodes_stops_the_run(node: str, tmp_path: Path) -> None:
    """The error names step and layer, has its own exit code, and only good checkpoints are kept."""
    result = trainer("run", "--loader", node, "--run", tmp_path / "run", *SMALL, *EXPLOSIVE)
    assert_refused(result, 8, "the loss exploded to ")
    assert re.search(
        r" at step 2 \(inspect \S+weight first\): there is no checkpoint yet; try a smaller --lr", result.stderr
    )
    for path in tmp_path.glob("run/checkpoints/step-*"):
        assert all(weights.isfinite().all() for weights in checkpoint.load(path).model.values())


def test_steps_between_log_lines_open_no_file(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate set by hand is read before the first step and after each log line, and applies from the step after it."""
    append, requested_rate = RunFolder.append, RunFolder.requested_rate
    readings = []

    def append_and_set(self: RunFolder, record: Any) -> None:
        append(self, record)
        if isinstance(record, StepRecord) and record.step == 4:
            self.request_rate(0.002)

    def requested_rate_and_count(self: RunFolder) -> float | None:
        rate = requested_rate(self)
        if threading.current_thread() is threading.main_thread():  # the thread that saves a checkpoint reads it, too
            readings.append(rate)
        return rate

    monkeypatch.setattr(RunFolder, "append", append_and_set)
    monkeypatch.setattr(RunFolder, "requested_rate", requested_rate_and_count)
    assert trainer("run", "--loader", node, "--run", tmp_path / "run", *SMALL, "--log-every", "4").exit_code == 0
    assert readings[:2] == [None, 0.002]
    assert len(readings) == 3  # before steps 1, 5 and 9 of 10
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lr"]) for row in rows if row["event"] == "set-lr"] == [(4, 0.002)]


def test_a_rate_set_by_hand_holds_from_the_next_step(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate set during training applies once, from the step after a log line, and is in log and checkpoint."""
    append = RunFolder.append
    by_hand = []

    def append_and_set(self: RunFolder, record: Any) -> None:
        append(self, record)
        if isinstance(record, StepRecord) and record.step == 4:
            by_hand.append(trainer("set-lr", self.path, "0.002"))

    monkeypatch.setattr(RunFolder, "append", append_and_set)
    assert trainer("run", "--loader", node, "--run", tmp_path / "run", *SMALL, "--log-every", "1").exit_code == 0
    assert by_hand[0].exit_code == 0, by_hand[0].output
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = {row["step"]: row["lr"] for row in rows if row["event"] == "step"}
    assert steps == {step: 0.01 if step <= 4 else 0.002 for step in range(1, 11)}
    assert [(row["step"], row["lr"], row["before"]) for row in rows if row["event"] == "set-lr"] == [(4, 0.002, 0.01)]
    assert checkpoint.load(checkpoint.saved(tmp_path / "run" / "checkpoints")[-1]).plain.schedule.lr == 0.002


def test_the_schedule_is_what_was_asked_for(node: str, tmp_path: Path) -> None:
    """The log shows a warm-up over the first epoch and a drop at the second, step by step."""
    schedule = ["--schedule", "step", "--drop-at", "1", "--warmup", "1", "--log-every", "1"]
    assert trainer("run", "--loader", node, "--run", tmp_path / "run", *SMALL, *schedule).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = [row["lr"] for row in rows if row["event"] == "step"]
    warm = [0.01 * (0.01 + 0.99 * seen / 300) for seen in (0, 64, 128, 192, 256)]
    assert found == pytest.approx([*warm, *[0.001] * 5])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (["run", "--data", "x", "--loader", "tcp://127.0.0.1:1"], 2, "no --data together with --loader"),
        (["set-lr", "nowhere", "0.1"], 3, "nowhere cannot be used: no run was started in it"),
        (["run", "--without", "conv9"], 2, "--without=conv9 cannot work"),
        (["run", "--lr", "-1"], 2, "--lr=-1.0 cannot work"),
        (["run", "--workers", "0"], 2, "--workers=0 cannot work: expected at least 1."),
        (["evaluate", "nowhere", "--loader", "tcp://127.0.0.1:1"], 3, "nowhere cannot be used: there is no such file"),
        (["predict", "nowhere", "some.png"], 3, "nowhere cannot be used: there is no such file"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    arguments: list[str], exit_code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An impossible command prints one sentence, sets its exit code, and leaves no run folder."""
    monkeypatch.chdir(tmp_path)
    assert_refused(trainer(*arguments), exit_code, sentence)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private node reports why it cannot start, and no run folder is left."""
    monkeypatch.chdir(tmp_path)
    result = trainer("run", "--data", "nowhere", "--devices", "cpu")
    assert result.exit_code != 0
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_private_node_that_dies_costs_nothing(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with an error and a checkpoint; after a resume every sample was seen exactly once."""
    started: list[LocalNode] = []
    append = RunFolder.append

    class Recorded(LocalNode):
        def __init__(self, data: str, workers: int) -> None:
            super().__init__(data=data, workers=workers)
            started.append(self)

    def append_and_kill(self: RunFolder, record: Any) -> None:
        append(self, record)
        if isinstance(record, StepRecord) and len(started) == 1:
            os.kill(started[0].pid, signal.SIGKILL)

    monkeypatch.setattr(feed, "_PRIVATE_TIMEOUT_S", 2.0)
    monkeypatch.setattr(feed, "LocalNode", Recorded)
    monkeypatch.setattr(RunFolder, "append", append_and_kill)
    options = ["run", "--data", dataset_dir, "--workers", "1", "--run", tmp_path / "run", *SMALL, "--batch-size", "16"]
    assert_refused(trainer(*options), 4, "within 2 s")
    assert 0 < summary_steps(tmp_path / "run") < 38
    assert trainer(*options, "--resume", "auto").exit_code == 0
    assert [(account["expected"], account["delivered"]) for account in summary(tmp_path / "run")["ledger"]] == [
        (300, 300)
    ] * 2


def test_a_node_that_stays_away_is_an_error_where_a_timeout_is_given(tmp_path: Path) -> None:
    """With --timeout a missing node is an error that says how to start one; without it the trainer waits."""
    nobody = ("--loader", "tcp://127.0.0.1:9", "--timeout", "0.3")
    assert_refused(trainer("run", *nobody, "--run", tmp_path / "run", *SMALL), 4, "no node answered within 0.3 s")
    assert_refused(trainer("run", *nobody[:3], "0", "--run", tmp_path / "run", *SMALL), 2, "--timeout=0.0 cannot work")


def test_records_of_another_side(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    """A network on crops of 84 of 96 pixels trains, evaluates, predicts and exports; one on crops of 70 does not mix with it."""
    for split, count in (("train", 12), ("val", 6)):
        make_dataset(tmp_path / f"{split}.lmdb", count, side=96)
    Image.new("RGB", (100, 120), "red").save(tmp_path / "red.png")
    one, other = tmp_path / "one", tmp_path / "other"
    small = ("--data", tmp_path, "--epochs", "1", "--batch-size", "6", "--width", "0.05", "--devices", "cpu")
    for run, options in ((one, ()), (other, ("--crop", "70"))):
        result = trainer("run", *small, "--workers", "1", "--run", run, *options)
        assert result.exit_code == 0, result.output
    assert checkpoint.load(find_checkpoint(one)).facts.crop == 84
    assert checkpoint.load(find_checkpoint(other)).facts.crop == 70
    assert trainer("predict", other, tmp_path / "red.png").exit_code == 0
    assert trainer("export", other, tmp_path / "net.safetensors").exit_code == 0
    assert trainer("evaluate", other, "--data", tmp_path, "--views", "ten-crop", "--json").exit_code == 0
    mixed = trainer("evaluate", one, other, "--data", tmp_path)
    assert mixed.exit_code == 2
    assert "a network for records of 96 pixels and crops of 84" in mixed.stderr
    for crop, sentence in (
        ("63", "--crop=63 cannot work: expected at least 64 pixels"),
        ("97", "expected 1 to 96 pixels"),
    ):
        result = trainer("run", *small, "--run", tmp_path / f"bad{crop}", "--crop", crop)
        assert result.exit_code == 2
        assert sentence in result.stderr
