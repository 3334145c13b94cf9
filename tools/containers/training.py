"""A training run in containers: its lines, its transport, and the results it leaves."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from loader_service.wire.messages import Status
from tools.containers.compose import Compose
from tools.errors import ToolFailed
from tools.results import check, read_summary
from tools.terminal import ROOT
from trainer.run.summary import Summary

RUNS: Final = Path("build/containers")
"""Folder that runs are copied to before their volume is removed."""

TRAINER: Final = "trainer-cpu"

TRAINING: Final = ("--width", "0.25", "--batch-size", "32", "--epochs")
"""As in `make demo`, but for fewer epochs: enough to be far above chance, or to lose a node and gain another."""

# The beginnings of the trainer's lines when its output is no terminal; trainer/run/console.py prints them.
MIDDLE: Final = re.compile(r"epoch \d+/\d+  ")  # two spaces: only one precedes "done"
"""A line from the middle of an epoch."""

PROGRESS: Final = re.compile(r"epoch \d+/\d+ ")
"""A line from the middle or the end of an epoch."""

EPOCH_OVER: Final = re.compile(r"epoch \d+/\d+ done")
"""The line at the end of an epoch."""

WAITING: Final = re.compile(r"waiting for a node at ")
"""The line of a trainer that no loader answers."""


def samples_made(status: Status) -> int:
    """Return the number of samples that a node's workers have made."""
    return sum(worker.samples for worker in status.workers)


def expect_transport(compose: Compose, transport: str) -> None:
    """Check that all clients of the first loader receive their batches by this transport, ``shm`` or ``tcp``.

    Raises:
        ToolFailed: they do not, or there is no client.
    """
    # A set, so that the comparison also fails without a client, or with one that differs.
    found = {client.transport for client in compose.status(1).clients}
    if found != {transport}:
        raise ToolFailed(f"batches should come by {transport}, but come by {', '.join(sorted(found)) or 'no way'}.")


def copy_run(compose: Compose, run: str) -> tuple[Path, Summary]:
    """Copy a run's folder out of its volume; return the copy's path, relative to ROOT, and the run's summary.

    Raises:
        ToolFailed: the run is not finished, or a sample was missed or seen twice.
    """
    folder = RUNS / run
    shutil.rmtree(ROOT / folder, ignore_errors=True)  # an earlier copy
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    compose.run("cp", f"{TRAINER}:/runs/{run}", str(folder))  # works on a container that has ended
    summary = read_summary(ROOT / folder / "summary.json")
    check(summary)
    return folder, summary
