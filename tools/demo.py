"""`make demo`: the whole path on sample photographs, by the commands that a user types.

Rules of this file:

- Each command is printed before it runs, and works as printed after `. .venv/bin/activate` in the repository's root.
- The report at the end is read from what the commands left behind or printed.
- The end of the demo, a failed step, Ctrl-C and SIGTERM all end every process that the demo started.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

import click

from loader_service import LocalNode
from loader_service.cli.job import CONTEXT, Job
from loader_service.local_node import start_command
from tools.results import Evaluation, check, decode, ledger_line, read_summary
from tools.terminal import ROOT, SAMPLE_IMAGES, finish, heading, run, say, show, start
from trainer.report.report import FOLDER, PAGE
from trainer.run.summary import Summary

DEMO: Final = Path("build/demo")
PORT: Final = 5555
"""The port of loader-service's default address."""

WORKERS: Final = 2

TRAINING: Final = ("--width", "0.25", "--batch-size", "32", "--epochs", "12")
"""A quarter of the kernels, small batches and few epochs: training takes about two minutes on two cores."""


def free_address() -> str:
    """Return the default address of a node, or one with another port if something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free, as ZeroMQ sees it
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            say(f"(port {PORT} is in use; the demo takes another)")
            probe.bind(("127.0.0.1", 0))  # the failed bind left the socket unbound
        # The port is free again from here on; the node binds it a moment later.
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def start_node(data: Path, address: str) -> LocalNode:
    """Start a node that serves ``data`` at ``address``; print its command first, and its own line once it is ready."""
    show(start_command(data, WORKERS, address))
    node = LocalNode(ROOT / data, WORKERS, bind=address)  # returns when it listens, so the trainer finds it
    say(node.announcement)
    return node


def new_run() -> Path:
    """Return the folder of a new run, relative to ROOT: its number is above all that exist."""
    # After "run-"; a folder such as run-copy does not count.
    numbers = [int(path.name[4:]) for path in (ROOT / DEMO).glob("run-*") if path.name[4:].isdecimal()]
    return DEMO / f"run-{max(numbers, default=0) + 1}"


def report(summary: Summary, evaluation: Evaluation, page: Path, took_s: float) -> None:
    """Print the results in a few lines, and the paths of what the run made."""
    accuracy = 1 - evaluation.top1_error
    lines = {
        "accuracy": f"{accuracy:.1%} top-1 of {evaluation.images} validation images, ten crops: "
        f"{accuracy / summary.chance:.1f} times chance ({summary.chance:.1%}); top-5 {1 - evaluation.top5_error:.1%}",
        "speed": f"{summary.images_per_s:,.0f} images/s; the trainer waited for data {summary.waiting_share:.1%} of the time",
        "exactly once": ledger_line(summary),
        "checkpoint": summary.checkpoint,
        "log": summary.log,
        "figures": ", ".join(summary.figures),
        "report": f"{page} (open it in a browser)",
    }
    heading(f"The demo took {took_s:.0f} s.")
    for name, text in lines.items():
        say(f"  {name:<13} {text}")


def demo(seed: int) -> None:
    """Run all steps, one after another."""
    started_s = time.monotonic()
    # Node and trainer find the user's keys by themselves; those of the demo are not put into the user's home.
    os.environ["XDG_CONFIG_HOME"] = str(ROOT / DEMO / "config")
    data, folder = DEMO / "data", new_run()  # preprocessing keeps the data of unchanged images
    heading("[1/6] Photographs: labelled views, cut from images that ship inside Python packages")
    run("python", "-m", "tools.sample_images", str(SAMPLE_IMAGES))
    heading("[2/6] Preprocessing: images on disk -> LMDB")
    run("loader-service", "preprocess", str(SAMPLE_IMAGES), str(data))
    heading(f"[3/6] A node with {WORKERS} worker processes")
    address = free_address()
    # Around all three steps: evaluation and report read their images from the node too.
    with start_node(data, address):
        heading("[4/6] Training, fed by that node")
        run("trainer", "run", "--loader", address, "--run", str(folder), *TRAINING, "--seed", str(seed))
        heading("[5/6] Evaluation: ten crops of each validation image")
        command = ["trainer", "evaluate", str(folder), "--loader", address, "--views", "ten-crop", "--json"]
        printed = finish(start(command, stdout=subprocess.PIPE))  # its JSON; progress goes to stderr
        heading("[6/6] Report: the figures of the paper, of this training")
        run("trainer", "report", str(folder), "--loader", address)
    evaluation = decode(printed, Evaluation, "the output of `trainer evaluate --json`")
    summary = read_summary(ROOT / folder / "summary.json")
    check(summary)
    report(summary, evaluation, folder / FOLDER / PAGE, time.monotonic() - started_s)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the training run.")
def main(seed: int) -> None:
    """Show the whole path on sample photographs: preprocess, serve, train, evaluate, report."""
    demo(seed)


if __name__ == "__main__":
    main()
