"""`make demo`: the whole path on sample photographs, by the commands that a user would type.

Rules of this file:

- Each command is printed before it runs, and runs in the repository's root with this Python's folder first on PATH, so
  that what is printed is what works after `. .venv/bin/activate`.
- What is shown at the end is read from what the commands left behind or printed; this file knows no result of its own.
- Whatever ends the demo (its end, a failed step, Ctrl-C, SIGTERM) also ends every process it started.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import msgspec

from loader_service import LocalNode
from loader_service.cli.job import CONTEXT, Job
from loader_service.local_node import start_command
from tools.errors import ToolFailed

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
IMAGES = Path("build/sample-images")
DEMO = Path("build/demo")
PORT = 5555
WORKERS = 2
STOP_S = 10.0
"""How long a process may take to end in peace: a node needs 2 s, a trainer also writes a checkpoint."""

GRACE_S = 2.0
"""How long a command that has had Ctrl-C from the terminal is left alone before it is told by the demo."""

TRAINING = ("--width", "0.25", "--batch-size", "32", "--epochs", "12")
"""A quarter of the kernels, small batches and a few epochs: what two cores learn in about two minutes."""


class Account(msgspec.Struct):
    """An epoch's account, as RUN/summary.json has it: samples, and slices asked for again."""

    epoch: int
    expected: int
    delivered: int
    duplicates_refused: int
    reassigned: int


class Summary(msgspec.Struct):
    """What the demo shows of RUN/summary.json; see ``trainer.run.summary``."""

    finished: bool
    chance: float
    images_per_s: float
    waiting_share: float
    ledger: Annotated[list[Account], msgspec.Meta(min_length=1)]
    checkpoint: str
    log: str
    figures: list[str]


class Evaluation(msgspec.Struct):
    """What the demo shows of `trainer evaluate --json`; errors are shares of 1."""

    images: int
    top1_error: float
    top5_error: float


class DemoFailed(ToolFailed):
    """A step did not do what it must; the message is a sentence for a person."""


def say(line: str = "") -> None:
    """Print one line, at once: the commands write to the same terminal."""
    click.echo(line)
    sys.stdout.flush()


def heading(number: int, title: str) -> None:
    """Announce a step."""
    say(click.style(f"\n[{number}/5] {title}", bold=True))


def show(command: Sequence[str]) -> None:
    """Print a command as a user types it."""
    say(click.style(f"$ {shlex.join(command)}", fg="cyan"))


def start(command: Sequence[str], **pipes: Any) -> subprocess.Popen[str]:
    """Print a command as a user would type it, and start it as if a user had."""
    show(command)
    bin_folder = Path(sys.executable).parent
    environ = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    try:
        return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **pipes)
    except OSError as error:
        raise DemoFailed(f"`{command[0]}` cannot be started: {error.strerror}.") from error


def stop(process: subprocess.Popen[str]) -> None:
    """End a process: in peace, and by force when it has not gone after STOP_S."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait until a command has done its work; return what it printed where that was piped."""
    try:
        printed, _ = process.communicate()
    except KeyboardInterrupt:
        # The terminal's Ctrl-C went to the command as well; a second signal now would cut its orderly end short.
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        raise
    finally:
        stop(process)
    if process.returncode:
        assert isinstance(process.args, list)
        raise DemoFailed(f"`{shlex.join(process.args)}` ended with exit code {process.returncode}.")
    return printed or ""


def run(*command: str) -> None:
    """Run one step, whose output goes to the terminal."""
    finish(start(list(command)))


def read(printed: str | bytes, kind: type[T], where: str) -> T:
    """JSON that must have the fields of ``kind``."""
    try:
        return msgspec.json.decode(printed, type=kind)
    except msgspec.MsgspecError as error:
        raise DemoFailed(f"{where} is not what the demo expects: {error}.") from error


def free_address() -> str:
    """The address that nodes use by default; another port of this machine where something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            say(f"(port {PORT} is taken here; the demo uses another)")
            probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def start_node(data: Path, address: str) -> LocalNode:
    """Start a node that serves ``data`` at ``address``; print its command before, and its own line when it is ready."""
    show(start_command(data, WORKERS, address))
    node = LocalNode(ROOT / data, WORKERS, bind=address)
    say(node.announcement)
    return node


def new_run() -> Path:
    """A run's folder that is not there yet: no run is ever overwritten."""
    numbers = [int(path.name[4:]) for path in (ROOT / DEMO).glob("run-*") if path.name[4:].isdecimal()]
    return DEMO / f"run-{max(numbers, default=0) + 1}"


def read_summary(path: Path) -> Summary:
    """What a run says of itself."""
    try:
        content = (ROOT / path).read_bytes()
    except OSError as error:
        raise DemoFailed(f"the training left no {path} that can be read: {error.strerror}.") from error
    return read(content, Summary, str(path))


def check(summary: Summary) -> None:
    """Refuse a run that was not finished, or in which a sample was missed or seen twice."""
    if not summary.finished:
        raise DemoFailed("the training was stopped before its last epoch.")
    for account in summary.ledger:
        if account.delivered != account.expected:
            raise DemoFailed(
                f"epoch {account.epoch} delivered {account.delivered} of {account.expected} samples: the ledger is broken."
            )


def report(summary: Summary, evaluation: Evaluation, took_s: float) -> None:
    """Say in a few lines what came out, and where everything lies."""
    accuracy = 1 - evaluation.top1_error
    expected = sum(account.expected for account in summary.ledger)
    delivered = sum(account.delivered for account in summary.ledger)
    refused = sum(account.duplicates_refused for account in summary.ledger)
    reassigned = sum(account.reassigned for account in summary.ledger)
    lines = {
        "accuracy": f"{accuracy:.1%} top-1 of {evaluation.images} validation images, ten crops: "
        f"{accuracy / summary.chance:.1f} times chance ({summary.chance:.1%}); top-5 {1 - evaluation.top5_error:.1%}",
        "speed": f"{summary.images_per_s:,.0f} images/s; the trainer waited for data {summary.waiting_share:.1%} of the time",
        "exactly once": f"{delivered:,} of {expected:,} samples in {len(summary.ledger)} epochs "
        f"({refused} duplicates refused, {reassigned} slices asked for again)",
        "checkpoint": summary.checkpoint,
        "log": summary.log,
        "pictures": ", ".join(summary.figures),
    }
    say(click.style(f"\nThe demo took {took_s:.0f} s.", bold=True))
    for name, text in lines.items():
        say(f"  {name:<13} {text}")


def demo(seed: int) -> None:
    """All steps, one after another."""
    started_s = time.monotonic()
    data, folder = DEMO / "data", new_run()
    heading(1, "Photographs: labelled views, cut from pictures that ship inside packages")
    run("python", "-m", "tools.sample_images", str(IMAGES))
    heading(2, "Preprocessing: pictures on disk -> LMDB")
    run("loader-service", "preprocess", str(IMAGES), str(data))
    heading(3, f"A node with {WORKERS} worker processes")
    address = free_address()
    with start_node(data, address):
        heading(4, "Training, fed by that node")
        run("trainer", "run", "--loader", address, "--run", str(folder), *TRAINING, "--seed", str(seed))
        heading(5, "Evaluation: ten crops of each validation image")
        command = ["trainer", "evaluate", str(folder), "--loader", address, "--views", "ten-crop", "--json"]
        printed = finish(start(command, stdout=subprocess.PIPE))
    evaluation = read(printed, Evaluation, "what `trainer evaluate --json` printed")
    summary = read_summary(folder / "summary.json")
    check(summary)
    report(summary, evaluation, time.monotonic() - started_s)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the training run.")
def main(seed: int) -> None:
    """Show the whole path on sample photographs: preprocess, serve, train, evaluate."""
    demo(seed)


if __name__ == "__main__":
    main()
