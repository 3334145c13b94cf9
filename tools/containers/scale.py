"""`make docker-scale`: three loaders, one killed in the middle of an epoch while another is added; then all loaders are lost
and the trainer crashes. The dataset is a folder of this machine.
"""

from __future__ import annotations

import shlex
import sys
from typing import Final

from tools.containers.compose import Compose, ServiceLog
from tools.containers.training import (
    EPOCH_OVER,
    MIDDLE,
    PROGRESS,
    TRAINER,
    TRAINING,
    WAITING,
    copy_run,
    expect_transport,
    samples_made,
)
from tools.errors import ToolFailed
from tools.results import ledger_line
from tools.terminal import ROOT, SAMPLE_IMAGES, heading, run, say

EPOCHS: Final = "3"
"""One in which a loader is lost, one in which all are, and one after that."""
CHECKPOINT_STEPS: Final = "10"
LOADERS: Final = "loader=3"


def scale() -> None:
    """Run the whole scenario and check that every sample was still seen exactly once.

    Raises:
        ToolFailed: a sample was missed or seen twice, or the killed loader had no work.
    """
    run(sys.executable, "-m", "tools.sample_images", str(SAMPLE_IMAGES))
    variables = {
        "IMAGES": str(ROOT / SAMPLE_IMAGES),
        "TRAINER_OPTIONS": shlex.join([*TRAINING, EPOCHS, "--checkpoint-every", CHECKPOINT_STEPS]),
        "RUN": "scale",
        "LOADER_WORKERS": "1",
    }
    with Compose(**variables) as compose:
        heading("three loaders and a trainer with one /dev/shm")
        compose.run("up", "--detach", "--scale", LOADERS, TRAINER)
        with compose.follow(TRAINER) as log:
            log.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "shm")
            made = replace_a_loader(compose, log)
            # The crash loses everything after the last checkpoint. One epoch more, and a checkpoint holds the ledger of
            # the loss, which the check at the end needs.
            log.until(EPOCH_OVER, "the epoch in which a loader was killed was over")
            log.until(MIDDLE, "it was in the middle of another epoch")
            lose_all_loaders(compose, log)
            log.finish()
        folder, summary = copy_run(compose, "scale")
    heading("The training run survived the loss of its loaders and its own crash.")
    say(f"  exactly once  {ledger_line(summary)}\n  added loader  {made:,} samples made\n  the run       {folder}")
    if not any(account.reassigned for account in summary.ledger):
        raise ToolFailed("the loader that was killed had no work: no slice was asked for again.")


def replace_a_loader(compose: Compose, log: ServiceLog) -> int:
    """Kill a working loader and add another; return the number of samples of the new one, once it has made any."""
    heading("in the middle of an epoch a loader is suspended, so that it keeps the slices that it was asked for")
    # The busiest one: the trainer is the bottleneck here, so the others may have no work.
    held = max(compose.indices("loader"), key=lambda index: samples_made(compose.status(index)))
    compose.freeze("loader", held)
    log.until(MIDDLE, "a loader could be killed in the middle of an epoch")
    heading("it is killed, and another is added")
    compose.destroy("loader", held)
    before = compose.indices("loader")  # without the killed one, whose number the new one may take over
    compose.run("up", "--detach", "--no-deps", "--no-recreate", "--scale", LOADERS, "loader")
    (added,) = compose.indices("loader") - before  # one exactly; anything else raises
    while not (made := samples_made(compose.status(added))):
        # The trainer's next line paces this loop; the end of its log ends it.
        log.until(PROGRESS, "the added loader had any work")
    return made


def lose_all_loaders(compose: Compose, log: ServiceLog) -> None:
    """Remove every loader, crash the trainer, let it restart, and bring loaders back."""
    heading("all loaders are lost, and the trainer crashes: it is restarted, and waits for them")
    compose.destroy("loader", *compose.indices("loader"))  # before the crash, so that the restarted trainer finds none
    compose.crash(TRAINER)  # its restart policy starts it again, and --resume auto continues the run
    log.until(WAITING, "it waited for a loader")
    compose.run("up", "--detach", "--no-deps", "--scale", LOADERS, "loader")
