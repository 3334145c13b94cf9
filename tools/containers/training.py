"""A training in containers, as both verbs see it: its lines, its way to the loaders, and what it leaves behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import click

from tools.containers.compose import Compose
from tools.demo import ROOT, Summary, check, read, say
from tools.errors import ToolFailed

RUNS: Final = Path("build/containers")
"""Where a run's folder is copied to before its volume is removed."""

TRAINER: Final = "trainer-cpu"

TRAINING: Final = ("--width", "0.25", "--batch-size", "32", "--epochs")
"""As in `make demo`, but for fewer epochs: enough to be far from chance, or to lose a node and win another."""

MIDDLE: Final = re.compile(r"epoch \d+/\d+  ")
"""What the trainer's lines begin with while it is in the middle of an epoch."""

PROGRESS: Final = re.compile(r"epoch \d+/\d+ ")
"""The same, and the line at an epoch's end."""

EPOCH_OVER: Final = re.compile(r"epoch \d+/\d+ done")
"""What its line at an epoch's end begins with."""

WAITING: Final = re.compile(r"waiting for a node at ")
"""What the trainer's lines begin with while no loader answers it."""


def expect_transport(compose: Compose, transport: str) -> None:
    """Refuse a trainer that gets its batches from the first loader in another way than it should."""
    found = {client.transport for client in compose.status(1).clients}
    if found != {transport}:
        raise ToolFailed(f"batches were to come by {transport}, but come by {', '.join(sorted(found)) or 'no way'}.")


def copy_run(compose: Compose, run: str) -> tuple[Path, Summary]:
    """A run's folder out of its volume, and what the run says of itself: that each sample was there once.

    Raises:
        ToolFailed: the run is not finished, or a sample was missed or seen twice.
    """
    folder = RUNS / run
    shutil.rmtree(ROOT / folder, ignore_errors=True)  # an earlier copy
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    compose.run("cp", f"{TRAINER}:/runs/{run}", str(folder))
    summary = read((ROOT / folder / "summary.json").read_bytes(), Summary, "the run's summary.json")
    check(summary)
    return folder, summary


def account(summary: Summary) -> str:
    """The ledger in one line."""
    delivered = sum(epoch.delivered for epoch in summary.ledger)
    expected = sum(epoch.expected for epoch in summary.ledger)
    refused = sum(epoch.duplicates_refused for epoch in summary.ledger)
    reassigned = sum(epoch.reassigned for epoch in summary.ledger)
    return (
        f"{delivered:,} of {expected:,} samples in {len(summary.ledger)} epochs "
        f"({refused} duplicates refused, {reassigned} slices asked for again)"
    )


def heading(title: str) -> None:
    """Announce a part."""
    say(click.style(f"\n{title}", bold=True))
