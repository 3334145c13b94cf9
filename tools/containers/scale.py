"""`make docker-scale`: three loaders, of which one is killed in the middle of an epoch while another is added; then all
are lost and the trainer crashes. What is trained on is a folder of this machine's.
"""

from __future__ import annotations

import shlex
import sys
from typing import Final

from tools.containers.compose import Compose, Lines
from tools.containers.training import (
    EPOCH_OVER,
    MIDDLE,
    PROGRESS,
    TRAINER,
    TRAINING,
    WAITING,
    account,
    copy_run,
    expect_transport,
    heading,
)
from tools.demo import IMAGES, ROOT, run, say
from tools.errors import ToolFailed

EPOCHS: Final = "4"
CHECKPOINT_STEPS: Final = "10"
LOADERS: Final = "loader=3"


def scale() -> None:
    """The whole play; every sample must be there once all the same."""
    run(sys.executable, "-m", "tools.sample_images", str(IMAGES))
    variables = {
        "IMAGES": str(ROOT / IMAGES),
        "TRAINER_OPTIONS": shlex.join([*TRAINING, EPOCHS, "--checkpoint-every", CHECKPOINT_STEPS]),
        "RUN": "scale",
        "LOADER_WORKERS": "1",
    }
    with Compose(**variables) as compose:
        heading("three loaders and a trainer with one /dev/shm")
        compose.run("up", "--detach", "--scale", LOADERS, TRAINER)
        with compose.follow(TRAINER) as lines:
            lines.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "shm")
            made = replace_a_loader(compose, lines)
            # So far that a checkpoint holds what the loss has cost: the crash takes all that came after the last one.
            lines.until(EPOCH_OVER, "the epoch in which a loader was killed was over")
            lines.until(MIDDLE, "it was in the middle of another epoch")
            lose_all_loaders(compose, lines)
            lines.finish()
        folder, summary = copy_run(compose, "scale")
    heading("The training has outlived its loaders, and its own crash.")
    say(f"  exactly once  {account(summary)}\n  the added one made {made:,} samples\n  the run       {folder}")
    if not any(epoch.reassigned for epoch in summary.ledger):
        raise ToolFailed("the loader that was killed had nothing to do: no slice was asked for again.")


def replace_a_loader(compose: Compose, lines: Lines) -> int:
    """Kill a loader that is at work and add another; returns how many samples the new one had made, once it had any."""
    heading("in the middle of an epoch a loader is held, so that it keeps what it is asked for")
    # The busiest one: the others may have nothing to do, for it is the trainer that is slow here.
    held = max(compose.indices("loader"), key=lambda index: compose.status(index).samples)
    compose.freeze("loader", held)
    lines.until(MIDDLE, "a loader could be killed in the middle of an epoch")
    heading("it is killed, and another is added")
    compose.destroy("loader", held)
    before = compose.indices("loader")  # without the killed one, whose number the new one may take over
    compose.run("up", "--detach", "--no-deps", "--no-recreate", "--scale", LOADERS, "loader")
    (added,) = compose.indices("loader") - before
    while not (made := compose.status(added).samples):
        lines.until(PROGRESS, "the loader that was added had any work")
    return made


def lose_all_loaders(compose: Compose, lines: Lines) -> None:
    """Take every loader away, let the trainer crash and start again, and bring loaders back."""
    heading("all loaders are lost, and the trainer crashes: it is started again, and waits for them")
    compose.destroy("loader", *compose.indices("loader"))
    compose.crash(TRAINER)
    lines.until(WAITING, "it waited for a loader")
    compose.run("up", "--detach", "--no-deps", "--scale", LOADERS, "loader")
