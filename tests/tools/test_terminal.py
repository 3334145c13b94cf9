"""Commands that tools run: failures are one sentence, and signals end the commands too."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools.errors import ToolFailed
from tools.terminal import run

ROOT = Path(__file__).parent.parent.parent


def test_a_failed_command_is_named() -> None:
    """The error has the command as it was printed, and its exit code."""
    with pytest.raises(ToolFailed, match=r"`python -c 'raise SystemExit\(3\)'` ended with exit code 3"):
        run("python", "-c", "raise SystemExit(3)")


def test_a_command_that_does_not_exist_is_one_sentence() -> None:
    """A program that cannot be started is a ToolFailed, without a traceback."""
    with pytest.raises(ToolFailed, match="`no-such-command` cannot be started: No such file"):
        run("no-such-command")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_tool_ends_its_command(number: signal.Signals) -> None:
    """A signal to the tool alone also ends the command that it waits for."""
    program = (
        "import click; from loader_service.cli.job import Job; from tools.terminal import run;"
        "step = 'import signal; print(\"running\", flush=True); signal.pause()';"
        "click.command(cls=Job)(lambda: run('python', '-c', step))()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "running\n"  # after the line with the command
        children = psutil.Process(process.pid).children()
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert len(children) == 1
    assert not children[0].is_running()
