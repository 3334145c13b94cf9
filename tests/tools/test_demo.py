"""The demo's own part: that it fails when it must, and leaves no process behind. Its steps have tests of their own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools import demo

ROOT = Path(__file__).parent.parent.parent


def account(delivered: int, expected: int = 100) -> demo.Account:
    """An epoch's account."""
    return demo.Account(epoch=0, expected=expected, delivered=delivered, duplicates_refused=0, reassigned=0)


def summary(*ledger: demo.Account, finished: bool = True) -> demo.Summary:
    """A run's summary with this ledger."""
    return demo.Summary(
        finished=finished,
        chance=0.1,
        images_per_s=200.0,
        waiting_share=0.01,
        ledger=list(ledger),
        checkpoint="run/checkpoints/best.pt",
        log="run/log.jsonl",
        figures=["run/kernels.png"],
    )


def test_a_run_that_saw_every_sample_once_passes() -> None:
    """k of k in every epoch is what the demo is there to show."""
    demo.check(summary(account(100), account(100)))


@pytest.mark.parametrize("delivered", [99, 101])
def test_a_sample_too_few_or_too_many_fails_the_demo(delivered: int) -> None:
    """The sentence names the epoch's figures."""
    with pytest.raises(demo.DemoFailed, match=f"delivered {delivered} of 100 samples"):
        demo.check(summary(account(100), account(delivered)))


def test_an_unfinished_run_fails_the_demo() -> None:
    """A trainer that was told to stop leaves in peace, with exit code 0; the demo must not take that for success."""
    with pytest.raises(demo.DemoFailed, match="stopped before its last epoch"):
        demo.check(summary(account(100), finished=False))


def test_a_summary_without_its_fields_fails_the_demo() -> None:
    """What the demo shows must be there, and of the right kind."""
    with pytest.raises(demo.DemoFailed, match=r"summary\.json is not what the demo expects"):
        demo.read(b'{"finished": true, "ledger": []}', demo.Summary, "summary.json")


def test_the_report_shows_figures_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy against chance, speed, waiting, k of k and the paths are all in the report."""
    demo.report(summary(account(100)), demo.Evaluation(images=50, top1_error=0.4, top5_error=0.1), took_s=200.0)
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
    ):
        assert part in shown


def test_no_run_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run's number is above all that are there."""
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.new_run() == Path("build/demo/run-1")
    for name in ("run-1", "run-9", "run-10", "run-copy"):
        (tmp_path / "build/demo" / name).mkdir(parents=True)
    assert demo.new_run() == Path("build/demo/run-11")


def test_a_taken_port_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else listens at the usual port, the demo's node gets another."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(demo, "PORT", taken)
        port = int(demo.free_address().removeprefix("tcp://127.0.0.1:"))
    assert port not in (0, taken)


def test_a_failed_step_names_its_command() -> None:
    """The sentence has the command as it was typed, and its exit code."""
    with pytest.raises(demo.DemoFailed, match=r"`python -c 'raise SystemExit\(3\)'` ended with exit code 3"):
        demo.run("python", "-c", "raise SystemExit(3)")


def test_a_command_that_is_not_there_is_one_sentence() -> None:
    """No traceback for a command that cannot be started."""
    with pytest.raises(demo.DemoFailed, match="`no-such-command` cannot be started: No such file"):
        demo.run("no-such-command")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_demo_stops_its_steps(number: signal.Signals) -> None:
    """A signal to the demo alone ends it and the process that it is waiting for."""
    program = (
        "import click; from loader_service.cli.job import Job; from tools import demo;"
        "step = 'import time; print(\"at work\", flush=True); time.sleep(60)';"
        "click.command(cls=Job)(lambda: demo.run('python', '-c', step))()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "at work\n"  # after the line with the command
        children = psutil.Process(process.pid).children()
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert len(children) == 1
    assert not children[0].is_running()
