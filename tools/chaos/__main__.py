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
from loader_service.wire.shm import DIRECTORY, sweep
from tools.chaos import damage, processes, record
from tools.chaos.account import EpochResult, results
from tools.chaos.arena import ALL_NODES, DAMAGED, Arena
from tools.chaos.faults import FAULTS, obstacle
from tools.chaos.storm import Storm
from tools.errors import ToolFailed
from tools.sample_dataset import given_or_made

RECORDS: Final = 8_000
SIDE_PX: Final = 64
"""Size of the dataset that is made: small records, so that two cores serve three clients in the middle of many faults, and
epochs of a few seconds."""

FINISH_S: Final = 60.0
"""Without faults an epoch takes a fraction of a second; a client that takes a minute hangs."""


FIGURES: Final = ("delivered", "lost", "twice", "differing", "duplicates refused", "reassigned", "substituted")
"""Names of the figures of an epoch, or of several; see :func:`sums`."""


def show(storm: Storm, accounts: dict[str, list[EpochResult]]) -> None:
    """Print two tables: the faults, and the epochs with a trace of one."""
    console = Console(width=120, highlight=False)
    faults = Table("fault", "acted", "without effect", "what happened", title="faults injected")
    for name in sorted(storm.acted | storm.idle):
        faults.add_row(name, str(storm.acted[name]), str(storm.idle[name]), FAULTS[name].what)
    console.print(faults)
    table = Table("client", "epochs", *FIGURES, title="epochs")
    for client, epochs in accounts.items():
        for epoch in epochs:
            if not epoch.flawless:
                table.add_row(client, f"number {epoch.epoch}", *sums([epoch]))
        flawless = [epoch for epoch in epochs if epoch.flawless]
        for name, eventful in (("with a trace", True), ("calm", False)):
            group = [epoch for epoch in flawless if epoch.eventful is eventful]
            table.add_row(client, f"{len(group)} {name}", *sums(group))
    console.print(table)


def sums(epochs: list[EpochResult]) -> list[str]:
    """Return the figures of epochs, summed, for a row of a table."""
    figures = [(e.delivered, e.lost, e.twice, e.differing) for e in epochs]
    ledgers = [(e.account.duplicates_refused, e.account.reassigned, e.account.substituted) for e in epochs]
    columns = [*zip(*figures, strict=True), *zip(*ledgers, strict=True)] if epochs else [()] * 7
    return [f"{sum(column):,}" for column in columns]


def check(arena: Arena, accounts: dict[str, list[EpochResult]], *, own: bool) -> None:
    """Check the results of a finished run.

    Args:
        arena: the arena, which has ended.
        accounts: the results of each client.
        own: whether nobody but this run has used /dev/shm.

    Raises:
        ToolFailed: an epoch differs from an undisturbed one, or something was left behind.
    """
    for client, epochs in accounts.items():
        flawed = [str(e.epoch) for e in epochs if not e.flawless]
        if flawed:
            raise ToolFailed(f"{client}: epochs {', '.join(flawed)} differ from an undisturbed run.")
        if not any(e.account.substituted for e in epochs):
            raise ToolFailed(f"{client}: records {arena.damaged} are damaged on every node, and none was replaced.")
    left = {*arena.left_behind()}  # after sweep(): a segment that is still there has an owner that lives
    left |= {f"shared memory {path}" for path in DIRECTORY.iterdir() if own}
    if left:
        raise ToolFailed(f"left behind: {', '.join(sorted(left))}.")


def write_record(
    path: Path, command: str, seconds: float, storm: Storm, arena: Arena, accounts: dict[str, list[EpochResult]]
) -> None:
    """Write the document about a run."""
    rows = [(FAULTS[name].what, f"{times:,}", f"{storm.idle[name]:,}") for name, times in storm.acted.most_common()]
    record.write(
        path,
        "A long run of faults",
        f"{storm.acted.total():,} faults of {len(rows)} kinds in {seconds / 60:.0f} minutes, several at a time, while "
        f"{len(accounts)} clients trained from up to {ALL_NODES} nodes. Every epoch of every client had each sample once, in "
        "order, with the bytes of an undisturbed run, and no process or shared memory was left behind. A fault counts if it "
        "was seen to act: a process was dead or stopped, bytes were held, a client was refused.",
        command,
        [
            *record.table(("fault", "acted", "without effect"), rows),
            "",
            f"Of the {damage.count(arena.served):,} records, {DAMAGED} were damaged on every node, so each epoch had that many "
            "samples replaced.",
            "",
            *record.table(
                ("client", "epochs", *FIGURES),
                [(client, f"{len(epochs):,}", *sums(epochs)) for client, epochs in accounts.items()],
            ),
        ],
    )


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--seed", type=int, help="Seed of faults, times and victims.  [default: random, and printed]")
@click.option(
    "--seconds", type=float, help="Shortest time during which faults begin.  [default: 180, or 0 with --count]"
)
@click.option("--count", default=0, help="Least number of faults that must be seen to act.")
@click.option("--faults", default=",".join(FAULTS), help="Kinds of faults, with commas between.  [default: all]")
@click.option("--curve/--plain", default=True, show_default=True, help="Encrypt with keys, or not.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory with train.lmdb to serve.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="build/chaos",
    show_default=True,
    help="Folder of logs and journals.",
)
@click.option(
    "--record", "document", type=click.Path(path_type=Path), help="Document to write about this run, if it succeeds."
)
def main(
    seed: int | None,
    seconds: float | None,
    count: int,
    faults: str,
    curve: bool,
    data: Path | None,
    out: Path,
    document: Path | None,
) -> None:
    """Inject failures of every kind while three clients train from several nodes, and check every sample."""
    names = [name.strip() for name in faults.split(",")]
    if unknown := sorted(set(names) - FAULTS.keys()):
        raise click.BadParameter(
            f"there is no {', '.join(unknown)}; there are {', '.join(FAULTS)}", param_hint="--faults"
        )
    seconds = (0.0 if count else 180.0) if seconds is None else seconds
    seed = secrets.randbits(32) if seed is None else seed
    rng = Random(seed)  # noqa: S311 - faults need not be hard to guess
    kind = "curve" if curve else "plain"
    again = f"python -m tools.chaos --seed {seed} --seconds {seconds:g} --count {count} --{kind}"
    click.echo(f"seed {seed}: {again}")
    for name in names:
        if reason := obstacle(name, curve=curve):
            click.echo(f"left out: {name}, because {reason}")
    names = [name for name in names if not obstacle(name, curve=curve)]
    own = processes.own_shared_memory()
    folder = out / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's saved states would be resumed
    folder.mkdir(parents=True)
    with given_or_made(data, RECORDS, SIDE_PX) as whole, Arena(whole, folder.resolve(), rng, curve=curve) as arena:
        storm = Storm(arena, rng, names)
        storm.rage(seconds, count)
        raged_s = storm.seconds
        click.echo("all faults are over; the clients finish their epochs")
        arena.finish(FINISH_S)
    sweep()  # removes segments of killed processes, as the next start of any node does
    click.echo("comparing every batch with an undisturbed run")
    # Of the served copy, which outlives the arena: its damaged records are replaced by the same rule.
    accounts = {client.name: results(arena.served, client.seed, client.folder) for client in arena.clients}
    show(storm, accounts)  # before check(), so that a failed run shows its tables too
    check(arena, accounts, own=own)
    epochs = [epoch for epochs in accounts.values() for epoch in epochs]
    said = f"{len(epochs)} epochs, {storm.acted.total()} faults: every sample once, in order, byte for byte."
    if document:
        write_record(document, f"{again} --record {document}", raged_s, storm, arena, accounts)
    click.echo(said)


if __name__ == "__main__":
    main(prog_name="python -m tools.chaos")
