"""Commands shown and run as a user types them: printed first, run in the repository's root, ended with their starter."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click

from tools.errors import ToolFailed

ROOT: Final = Path(__file__).resolve().parent.parent
"""The repository."""

SAMPLE_IMAGES: Final = Path("build/sample-images")
"""Folder of the sample images, relative to ROOT, as commands name it."""

STOP_S: Final = 10.0
"""Time that a command has to end after SIGTERM: a trainer writes a checkpoint first."""

CTRL_C_S: Final = 2.0
"""Time that a command has to end after Ctrl-C, before it also gets SIGTERM."""


def say(line: str = "") -> None:
    """Print one line at once: commands write to the same terminal, and their lines must not overtake it."""
    click.echo(line)
    sys.stdout.flush()


def heading(title: str) -> None:
    """Print the title of a step."""
    say(click.style(f"\n{title}", bold=True))


def show(command: Sequence[str]) -> None:
    """Print a command as a user types it."""
    say(click.style(f"$ {shlex.join(command)}", fg="cyan"))


def start(command: Sequence[str], environ: Mapping[str, str] | None = None, **pipes: Any) -> subprocess.Popen[str]:
    """Print a command and start it in ROOT.

    Args:
        command: program and arguments.
        environ: its environment; by default this process's, with the folder of this Python first on PATH, so that the
            command runs as it does after ``. .venv/bin/activate``.
        pipes: ``stdin``, ``stdout`` and ``stderr`` of subprocess.Popen.

    Raises:
        ToolFailed: the program cannot be started.
    """
    show(command)
    if environ is None:
        # Not resolved: in .venv/bin, python is a link to an interpreter elsewhere, without the other commands next to
        # it.
        folder = Path(sys.executable).parent
        environ = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    try:
        # In the same process group, so that the terminal's Ctrl-C reaches the command too.
        return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **pipes)
    except OSError as error:  # not on PATH, or not executable
        raise ToolFailed(f"`{command[0]}` cannot be started: {error.strerror}.") from error


def stop(process: subprocess.Popen[str]) -> None:
    """End a process with SIGTERM, and with SIGKILL if it still runs after STOP_S."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # also a process that ignores SIGTERM, so that wait() returns
            process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait until a command has ended; return what it printed if its output is piped, else an empty string.

    Raises:
        ToolFailed: its exit code is not 0.
    """
    try:
        printed, _ = process.communicate()  # reads a pipe to its end while it waits, so the pipe cannot fill up
    except KeyboardInterrupt:
        # The terminal's Ctrl-C went to the command as well; a second signal now would cut its orderly end short.
        with suppress(subprocess.TimeoutExpired):
            process.wait(CTRL_C_S)
        raise
    finally:
        stop(process)  # no effect on a command that has ended
    if process.returncode:
        assert isinstance(process.args, list)  # as start() gives it: for mypy
        raise ToolFailed(f"`{shlex.join(process.args)}` ended with exit code {process.returncode}.")
    return printed or ""


def run(*command: str) -> None:
    """Run one command, whose output goes to the terminal.

    Raises:
        ToolFailed: it cannot be started, or its exit code is not 0.
    """
    finish(start(list(command)))
