"""The demo's own part: its report, its run folders and its port. Its steps have tests elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from loader_service import EpochAccount
from tools import demo
from tools.results import Evaluation
from trainer.run.summary import Summary


def summary(*ledger: EpochAccount) -> Summary:
    """A finished run's summary with this ledger."""
    return Summary(
        finished=True,
        epochs=len(ledger),
        steps=4,
        accuracy=0.5,
        top5_accuracy=0.9,
        best_accuracy=0.6,
        chance=0.1,
        images_per_s=200.0,
        waiting_share=0.01,
        ledger=list(ledger),
        checkpoint="run/checkpoints/best.pt",
        log="run/log.jsonl",
        figures=["run/kernels.png"],
    )


def test_the_report_shows_figures_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy against chance, speed, waiting, the ledger and the paths are all in the report."""
    demo.report(
        summary(EpochAccount(0, 100, 100)),
        Evaluation(images=50, top1_error=0.4, top5_error=0.1),
        Path("run/report/report.html"),
        took_s=200.0,
    )
    shown = capsys.readouterr().out
    for part in (
        "60.0% top-1 of 50 validation images",
        "6.0 times chance (10.0%)",
        "200 images/s",
        "waited for data 1.0% of the time",
        "100 of 100 samples in 1 epochs",
        "run/checkpoints/best.pt",
        "run/log.jsonl",
        "run/kernels.png",
        "run/report/report.html",
    ):
        assert part in shown


def test_no_run_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a new run is above all that exist."""
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.new_run() == Path("build/demo/run-1")
    for name in ("run-1", "run-9", "run-10", "run-copy"):
        (tmp_path / "build/demo" / name).mkdir(parents=True)
    assert demo.new_run() == Path("build/demo/run-11")


def test_a_port_in_use_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's node gets another port if something else listens at the usual one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(demo, "PORT", taken)
        port = int(demo.free_address().removeprefix("tcp://127.0.0.1:"))
    assert port not in (0, taken)


def test_the_printed_command_starts_a_node(dataset_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The node's command is printed before its announcement, with the options that the node has."""
    with demo.start_node(dataset_dir, "tcp://127.0.0.1:*") as node:
        command, announcement = capsys.readouterr().out.splitlines()
        assert command == f"$ loader-service start --workers 2 --data {dataset_dir} --bind 'tcp://127.0.0.1:*'"
        assert announcement == node.announcement
