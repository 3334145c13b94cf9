"""`make docker`: from sample images to evaluation by containers that share memory, watched by Prometheus; then the
trainer of another host, which shares nothing with the loader but the keys.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tools.containers.compose import PROJECT, Compose
from tools.containers.training import MIDDLE, RUNS, TRAINER, TRAINING, account, copy_run, expect_transport, heading
from tools.demo import ROOT, Evaluation, Summary, read, say
from tools.errors import ToolFailed

EPOCHS: Final = "6"
KEYS: Final = ROOT / RUNS / "keys"


def demo() -> None:
    """The demo, with its results at the end."""
    started_s = time.monotonic()
    variables = {
        "TRAINER_OPTIONS": shlex.join([*TRAINING, EPOCHS]),
        "RUN": "demo",
        "KEYS": str(KEYS),
        # Ports that are free here; the loader's is one that other hosts reach.
        "LOADER_PUBLISH": "0.0.0.0::5555",
        "PROMETHEUS_PUBLISH": "127.0.0.1::9090",
    }
    with Compose(**variables) as compose, folder_of_keys(compose):
        heading("preprocess, keys, loader, trainer: each starts when those before it have done their part")
        compose.run("up", "--detach", "prometheus", TRAINER)
        with compose.follow(TRAINER) as lines:
            lines.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "shm")
            lines.finish()
        heading("evaluation: ten crops of each validation image")
        evaluation = evaluate(compose, "demo")
        folder, summary = copy_run(compose, "demo")
        heading("what Prometheus has seen")
        watched = watch(compose, sum(epoch.delivered for epoch in summary.ledger))
        heading("a trainer on another host: another network and other memory, but the same keys")
        elsewhere = train_elsewhere(compose)
    accuracy = 1 - evaluation.top1_error
    heading(f"The demo took {time.monotonic() - started_s:.0f} s.")
    say(
        f"  accuracy      {accuracy:.1%} top-1 of {evaluation.images} validation images, ten crops; "
        f"chance is {summary.chance:.1%}\n"
        f"  speed         {summary.images_per_s:,.0f} images/s; the trainer waited for data "
        f"{summary.waiting_share:.1%} of the time\n"
        f"  exactly once  {account(summary)}\n"
        f"  elsewhere     {account(elsewhere)}\n"
        f"  Prometheus    {watched:,.0f} samples\n"
        f"  the run       {folder}"
    )
    if accuracy <= summary.chance:
        raise ToolFailed("the network has learnt nothing.")


@contextmanager
def folder_of_keys(compose: Compose) -> Iterator[None]:
    """KEYS while the block runs. Its files are the containers' user's, so it is a container that takes them away."""
    KEYS.mkdir(parents=True, exist_ok=True)
    KEYS.chmod(0o777)  # that user is none of this machine's; the secrets that it makes are readable to it alone
    try:
        yield
    finally:
        compose.run("run", "--rm", "-T", "--no-deps", "keys", "find", "/keys", "-mindepth", "1", "-delete")
        KEYS.rmdir()


def evaluate(compose: Compose, run: str) -> Evaluation:
    """The newest checkpoint's error, by a container of its own."""
    options = ["--loader", "tcp://loader:5555", "--views", "ten-crop", "--json"]
    printed = compose.ask("run", "--rm", "-T", "--no-deps", TRAINER, "evaluate", f"/runs/{run}", *options)
    return read(printed, Evaluation, "what `trainer evaluate --json` printed")


def watch(compose: Compose, delivered: int) -> float:
    """How many samples the loader has delivered in Prometheus's eyes.

    Raises:
        ToolFailed: it does not watch the loader, or has seen fewer than the trainer's ledger has.
    """
    if compose.metric('count(up{job="loader"} == 1)') != 1:
        raise ToolFailed("Prometheus does not reach the one loader that there is.")
    seen = compose.metric("sum(loader_service_node_samples_total)")
    if seen < delivered:
        raise ToolFailed(f"Prometheus has seen {seen:,.0f} samples leave the loader, the trainer {delivered:,} arrive.")
    return seen


def train_elsewhere(compose: Compose) -> Summary:
    """One epoch by a project that reaches this one's loader as another host would: at its published port."""
    variables = {
        "LOADER": f"tcp://{compose.outside_address('loader', 5555)}",
        "KEYS": str(KEYS),
        "TRAINER_OPTIONS": shlex.join([*TRAINING, "1"]),
        "RUN": "elsewhere",
    }
    with Compose(f"{PROJECT}-elsewhere", **variables) as other:
        other.run("up", "--detach", "--no-deps", "shm", TRAINER)
        with other.follow(TRAINER) as lines:
            lines.until(MIDDLE, "it was in the middle of an epoch")
            expect_transport(compose, "tcp")
            lines.finish()
        return copy_run(other, "elsewhere")[1]
