"""`make docker`: from sample images to evaluation in containers that share memory, watched by Prometheus; then a trainer on
another host, which shares nothing with the loader but the keys.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tools.containers.compose import PROJECT, Compose
from tools.containers.training import MIDDLE, RUNS, TRAINER, TRAINING, copy_run, expect_transport
from tools.errors import ToolFailed
from tools.results import Evaluation, decode, ledger_line
from tools.terminal import ROOT, heading, say
from trainer.run.summary import Summary

EPOCHS: Final = "3"
"""Enough for seven times the accuracy of chance."""
KEYS: Final = ROOT / RUNS / "keys"


def demo() -> None:
    """Run the demo and print its results.

    Raises:
        ToolFailed: a step failed, a sample was missed or seen twice, or the network is no better than chance.
    """
    started_s = time.monotonic()
    variables = {
        "TRAINER_OPTIONS": shlex.join([*TRAINING, EPOCHS]),
        "RUN": "demo",
        "KEYS": str(KEYS),
        # Free ports of this machine; other hosts reach the loader's.
        "LOADER_PUBLISH": "0.0.0.0::5555",
        "PROMETHEUS_PUBLISH": "127.0.0.1::9090",
    }
    # The folder inside: a container of this project empties it before the project is removed.
    with Compose(**variables) as compose, folder_of_keys(compose):
        heading("preprocess, keys, loader, trainer: each starts when those before it are done or ready")
        compose.run("up", "--detach", "prometheus", TRAINER)
        with compose.follow(TRAINER) as log:
            log.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "shm")  # during training: the client is gone afterwards
            log.finish()
        heading("evaluation: ten crops of each validation image")
        evaluation = evaluate(compose, "demo")  # while the loader runs, from which it gets its images
        folder, summary = copy_run(compose, "demo")
        heading("samples counted by Prometheus")
        counted = count_samples(compose, sum(account.delivered for account in summary.ledger))
        heading("a trainer on another host: another network and other memory, but the same keys")
        elsewhere = train_elsewhere(compose)
    accuracy = 1 - evaluation.top1_error
    heading(f"The demo took {time.monotonic() - started_s:.0f} s.")
    say(
        f"  accuracy      {accuracy:.1%} top-1 of {evaluation.images} validation images, ten crops; "
        f"chance is {summary.chance:.1%}\n"
        f"  speed         {summary.images_per_s:,.0f} images/s; the trainer waited for data "
        f"{summary.waiting_share:.1%} of the time\n"
        f"  exactly once  {ledger_line(summary)}\n"
        f"  elsewhere     {ledger_line(elsewhere)}\n"
        f"  Prometheus    {counted:,.0f} samples\n"
        f"  the run       {folder}"
    )
    if accuracy <= summary.chance:  # last, so that a failed run shows its figures too
        raise ToolFailed("the network has learnt nothing.")


@contextmanager
def folder_of_keys(compose: Compose) -> Iterator[None]:
    """Make KEYS for the block. The containers' user owns its files, so a container removes them at the end."""
    KEYS.mkdir(parents=True, exist_ok=True)
    KEYS.chmod(0o777)  # that user does not exist on this machine; the secrets that it makes are readable to it alone
    try:
        yield
    finally:
        # -mindepth: not /keys itself, a mount.
        compose.run("run", "--rm", "-T", "--no-deps", "keys", "find", "/keys", "-mindepth", "1", "-delete")
        KEYS.rmdir()


def evaluate(compose: Compose, run: str) -> Evaluation:
    """Evaluate a run's newest checkpoint in a container of its own."""
    options = ["--loader", "tcp://loader:5555", "--views", "ten-crop", "--json"]
    printed = compose.ask("run", "--rm", "-T", "--no-deps", TRAINER, "evaluate", f"/runs/{run}", *options)
    return decode(printed, Evaluation, "the output of `trainer evaluate --json`")


def count_samples(compose: Compose, delivered: int) -> float:
    """Return the number of samples that the loader has delivered according to Prometheus.

    Raises:
        ToolFailed: it does not scrape the loader, or has counted fewer than the trainer's ledger.
    """
    if compose.metric('count(up{job="loader"} == 1)') != 1:
        raise ToolFailed("Prometheus does not reach the loader.")
    counted = compose.metric("sum(loader_service_node_samples_total)")
    # Prometheus also counts validation and evaluation, which the ledger leaves out, so it may have more.
    if counted < delivered:
        raise ToolFailed(
            f"Prometheus counts {counted:,.0f} samples sent by the loader, the trainer {delivered:,} received."
        )
    return counted


def train_elsewhere(compose: Compose) -> Summary:
    """Train one epoch in a project that reaches this one's loader as another host does: at its published port."""
    variables = {
        "LOADER": f"tcp://{compose.outside_address('loader', 5555)}",
        "KEYS": str(KEYS),
        "TRAINER_OPTIONS": shlex.join([*TRAINING, "1"]),
        "RUN": "elsewhere",
    }
    with Compose(f"{PROJECT}-elsewhere", **variables) as other:
        other.run("up", "--detach", "--no-deps", "shm", TRAINER)  # --no-deps: no loader in this project
        with other.follow(TRAINER) as log:
            log.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "tcp")  # this loader's only client by now: the first trainer has ended
            log.finish()
        return copy_run(other, "elsewhere")[1]
