"""`make chaos`: faults of every kind against running epoch loops, and a check of everything that was delivered.

The exit code is 0 if and only if every requested kind of fault was injected, every epoch of every client has each sample
once, in the order and with the bytes of an undisturbed run, and no process or shared memory was left behind.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from random import Random
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from loader_service.cli.job import CONTEXT, Job
from loader_service.wire.shm import sweep
from tools.chaos.account import EpochResult, results
from tools.chaos.arena import Arena
from tools.chaos.faults import FAULTS
from tools.chaos.storm import Storm
from tools.errors import ToolFailed
from tools.sample_dataset import given_or_made

FINISH_S: Final = 60.0
"""Without faults an epoch takes a fraction of a second; a client that takes a minute hangs."""


def show(storm: Storm, accounts: dict[str, list[EpochResult]]) -> None:
    """Print two tables: the faults, and the epochs with a trace of one."""
    console = Console(width=120, highlight=False)
    faults = Table("fault", "times", "what happened", title="faults injected")
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
        # A row of zeros by definition: an epoch with any other figure there is eventful.
        calm = sum(not e.eventful for e in epochs)
        table.add_row(
            client, f"{calm} calm", str(sum(e.delivered for e in epochs if not e.eventful)), "0", "0", "0", "0", "0"
        )
    console.print(table)


def check(arena: Arena, accounts: dict[str, list[EpochResult]]) -> None:
    """Check the results of a finished run.

    Raises:
        ToolFailed: an epoch differs from an undisturbed one, or something was left behind.
    """
    for client, epochs in accounts.items():
        flawed = [str(e.epoch) for e in epochs if not e.flawless]
        if flawed:
            raise ToolFailed(f"{client}: epochs {', '.join(flawed)} differ from an undisturbed run.")
    left = arena.left_behind()  # after sweep(): a segment that is still there has an owner that lives
    if left:
        raise ToolFailed(f"left behind: {', '.join(left)}.")


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--seed", type=int, help="Seed of faults, times and victims.  [default: random, and printed]")
@click.option("--seconds", type=float, default=240, show_default=True, help="Time during which faults begin.")
@click.option("--faults", default=",".join(FAULTS), help="Kinds of faults, with commas between.  [default: all]")
@click.option("--curve/--plain", default=None, help="Encrypt with keys, or not.  [default: drawn from the seed]")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory with train.lmdb to serve.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="build/chaos",
    show_default=True,
    help="Folder of logs and journals.",
)
def main(seed: int | None, seconds: float, faults: str, curve: bool | None, data: Path | None, out: Path) -> None:
    """Inject failures of every kind while two clients train from several nodes, and check every sample."""
    names = [name.strip() for name in faults.split(",")]
    if unknown := sorted(set(names) - FAULTS.keys()):
        raise click.BadParameter(
            f"there is no {', '.join(unknown)}; there are {', '.join(FAULTS)}", param_hint="--faults"
        )
    seed = secrets.randbits(32) if seed is None else seed
    rng = Random(seed)  # noqa: S311 - faults need not be hard to guess
    drawn = rng.random() < 0.5  # drawn even if the option is given, so that all later draws are the same
    curve = drawn if curve is None else curve
    kind = "curve" if curve else "plain"
    click.echo(f"seed {seed}: python -m tools.chaos --seed {seed} --seconds {seconds:g} --{kind}")
    folder = out / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's saved states would be resumed
    folder.mkdir(parents=True)
    # The dataset outlives the arena: results() reads it again, for an undisturbed run.
    with given_or_made(data) as served:
        with Arena(served, folder, rng, curve=curve) as arena:
            storm = Storm(arena, rng, names)
            storm.rage(seconds)
            click.echo("all faults are over; the clients finish their epochs")
            arena.finish(FINISH_S)
        sweep()  # removes segments of killed processes, as the next start of any node does
        accounts = {client.name: results(served, client.seed, client.folder) for client in arena.clients}
    show(storm, accounts)  # before check(), so that a failed run shows its tables too
    check(arena, accounts)
    epochs = sum(len(epochs) for epochs in accounts.values())
    click.echo(f"{epochs} epochs, {storm.injected.total()} faults: every sample once, in order, byte for byte.")


if __name__ == "__main__":
    main(prog_name="python -m tools.chaos")
