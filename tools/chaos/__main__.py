"""`make chaos`: faults of every kind against running epoch loops, and the account of what was delivered.

The exit code is 0 if and only if every fault that was asked for was injected, every epoch of every client has each
sample once, in the order and with the bytes of an undisturbed run, and nothing was left behind.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from loader_service.cli.job import CONTEXT, Job
from loader_service.data.codecs import SHAPE
from loader_service.data.manifest import Statistics
from loader_service.data.writer import Writer
from loader_service.wire.shm import sweep
from tools.chaos.account import EpochResult, results
from tools.chaos.arena import Arena
from tools.chaos.faults import FAULTS, Undo
from tools.errors import ToolFailed

RECORDS: Final = 400
PACE_S: Final = (0.3, 2.0)
"""Between one fault and the next: most last longer, so several are at work at a time."""

FIRST_ROUND_S: Final = 30.0
"""How much longer than asked a run may last until each kind of fault was there once."""

FINISH_S: Final = 60.0
"""An epoch takes a fraction of a second once all faults are over; a client that takes a minute hangs."""

PROGRESS_S: Final = 5.0
BEAT_S: Final = 0.1


def make_data(folder: Path) -> None:
    """A training split of pictures without symmetry, no two of them alike."""
    y, x, channel = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    statistics = Statistics(
        mean_image=np.full(SHAPE, 127.5, np.float32),
        channel_means=np.full(3, 127.5),
        covariance=np.diag([0.09, 0.04, 0.01]),
        eigenvalues=np.array([0.09, 0.04, 0.01]),
        eigenvectors=np.eye(3),
    )
    with Writer(folder / "train.lmdb", codec="raw", class_names=("even", "odd")) as writer:
        for number in range(RECORDS):
            pixels = ((3 * y + 5 * x + 80 * channel + 37 * number + (y * x) // 64) // 2 % 256).astype(np.uint8)
            writer.put(number % 2, pixels.tobytes(), f"{number}")
        writer.finish(statistics, made_by={"made by": "tools.chaos"})


class Storm:
    """Draws faults, begins them and ends them.

    Each kind comes once, the longest first, before any comes again; then in rounds of random order. A later round ends
    where nobody is left to harm: there may be no node to lose or to add any more.
    """

    def __init__(self, arena: Arena, rng: Random, names: list[str], began: float) -> None:
        self._arena, self._rng, self._names, self._began = arena, rng, names, began
        self._deck = sorted(rng.sample(names, len(names)), key=lambda name: -FAULTS[name].lasts_s[1])
        self._undos: list[tuple[float, Undo]] = []
        self.injected: Counter[str] = Counter()

    @property
    def missing(self) -> list[str]:
        """The kinds that were not injected yet."""
        return [name for name in self._names if not self.injected[name]]

    @property
    def at_work(self) -> int:
        """How many faults are to be undone."""
        return len(self._undos)

    def begin_one(self) -> None:
        """Inject the first fault of the deck that finds a victim."""
        if not self._deck:
            self._deck = self._rng.sample(self._names, len(self._names))
        for name in self._deck:
            undo = FAULTS[name].begin(self._arena, self._rng)
            if undo is not None:
                lasts_s = self._rng.uniform(*FAULTS[name].lasts_s)
                click.echo(f"{time.monotonic() - self._began:6.1f} s  {name}" + f" for {lasts_s:.1f} s" * (lasts_s > 0))
                self._undos.append((time.monotonic() + lasts_s, undo))
                self._deck.remove(name)
                self.injected[name] += 1
                return
        if not self.missing:
            self._deck = []

    def end_due(self) -> None:
        """Undo the faults whose time is over."""
        now = time.monotonic()
        due = [undo for at, undo in self._undos if at <= now]
        self._undos = [(at, undo) for at, undo in self._undos if at > now]
        for undo in due:
            undo()


def rage(arena: Arena, storm: Storm, rng: Random, seconds: float) -> None:
    """Let the storm rage once every client trains, and then wait until all that it did is undone.

    Raises:
        ToolFailed: a client did not live through it, or a kind of fault found no victim.
    """
    clock = threading.Event()  # never set: a clock to wait on
    while not all(client.batches() for client in arena.clients):
        arena.check()
        clock.wait(BEAT_S)
    began = next_fault = shown = time.monotonic()
    while True:
        now = time.monotonic()
        storm.end_due()
        arena.check()
        over = now - began > seconds and (not storm.missing or now - began > seconds + FIRST_ROUND_S)
        if over and not storm.at_work:
            break
        if not over and now >= next_fault:
            arena.note_segments()
            storm.begin_one()
            next_fault = now + rng.uniform(*PACE_S)
        if now - shown >= PROGRESS_S:
            shown = now
            counts = ", ".join(f"{client.name} {client.batches():,} batches" for client in arena.clients)
            click.echo(
                f"{now - began:6.1f} s  {counts}; {sum(storm.injected.values())} faults, {storm.at_work} at work"
            )
        clock.wait(BEAT_S)
    if storm.missing:
        raise ToolFailed(f"no victim was found for {', '.join(storm.missing)}: these were not injected.")


def show(storm: Storm, accounts: dict[str, list[EpochResult]]) -> None:
    """The two tables: faults, and epochs in which one can be seen."""
    console = Console(width=120, highlight=False)
    faults = Table("fault", "times", "what happened to", title="faults injected")
    for name, times in sorted(storm.injected.items()):
        faults.add_row(name, str(times), FAULTS[name].what)
    console.print(faults)
    table = Table(
        "client", "epoch", "delivered", "lost", "twice", "differing", "duplicates refused", "reassigned", title="epochs"
    )
    for client, epochs in accounts.items():
        for e in epochs:
            if e.eventful:
                row = (e.epoch, e.delivered, e.lost, e.twice, e.differing)
                table.add_row(client, *map(str, row), str(e.account.duplicates_refused), str(e.account.reassigned))
        calm = sum(not e.eventful for e in epochs)
        table.add_row(
            client, f"{calm} calm", str(sum(e.delivered for e in epochs if not e.eventful)), "0", "0", "0", "0", "0"
        )
    console.print(table)


def check(arena: Arena, accounts: dict[str, list[EpochResult]]) -> None:
    """The verdict.

    Raises:
        ToolFailed: an epoch is not what it should be, or something was left behind.
    """
    for client, epochs in accounts.items():
        flawed = [str(e.epoch) for e in epochs if not e.flawless]
        if flawed:
            raise ToolFailed(f"{client}: epochs {', '.join(flawed)} are not those of an undisturbed run.")
    left = arena.left_behind()
    if left:
        raise ToolFailed(f"left behind: {', '.join(left)}.")


@contextmanager
def dataset(given: Path | None) -> Iterator[Path]:
    """The data directory that was given, or one that is gone afterwards."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="loader-service-chaos-") as folder:
        make_data(Path(folder))
        yield Path(folder)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--seed", type=int, help="Which faults, when and on whom; drawn and printed if not given.")
@click.option("--seconds", type=float, default=240, show_default=True, help="For how long faults are begun.")
@click.option("--faults", default=",".join(FAULTS), help="Which kinds, with commas between; all of them if not given.")
@click.option("--curve/--plain", default=None, help="With keys or without; drawn from the seed if not given.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="A directory with train.lmdb to serve.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="build/chaos", show_default=True, help="For logs and journals."
)
def main(seed: int | None, seconds: float, faults: str, curve: bool | None, data: Path | None, out: Path) -> None:
    """Cause failures of every kind while two clients train from several nodes, and settle the account."""
    names = [name.strip() for name in faults.split(",")]
    if unknown := sorted(set(names) - FAULTS.keys()):
        raise click.BadParameter(
            f"there is no {', '.join(unknown)}; there are {', '.join(FAULTS)}", param_hint="--faults"
        )
    seed = secrets.randbits(32) if seed is None else seed
    rng = Random(seed)  # noqa: S311 - faults need not be hard to guess
    drawn = rng.random() < 0.5  # also where it is given, so that the rest is drawn the same
    curve = drawn if curve is None else curve
    kind = "curve" if curve else "plain"
    click.echo(f"seed {seed}: python -m tools.chaos --seed {seed} --seconds {seconds:g} --{kind}")
    folder = out / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with dataset(data) as served:
        with Arena(served, folder, rng, curve=curve) as arena:
            storm = Storm(arena, rng, names, time.monotonic())
            rage(arena, storm, rng, seconds)
            click.echo("every fault is over; the clients end their epochs")
            arena.finish(FINISH_S)
        sweep()  # as the next start of any node does
        accounts = {client.name: results(served, client.seed, client.folder) for client in arena.clients}
    show(storm, accounts)
    check(arena, accounts)
    epochs = sum(len(results) for results in accounts.values())
    click.echo(f"{epochs} epochs, {sum(storm.injected.values())} faults: every sample once, in order, byte for byte.")


if __name__ == "__main__":
    main(prog_name="python -m tools.chaos")
