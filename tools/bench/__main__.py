"""``make bench``: this project, the limits of the machine and other loaders, measured in one run on this machine."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
import msgspec

from loader_service.cli.job import CONTEXT, Job
from tools.bench.contest import play
from tools.bench.contestants import PEERS, NotInstalled, limits, ours, peers, python_of, versions
from tools.bench.records import find_source, make
from tools.bench.report.document import CHART, Results, chart, machine, markdown
from tools.bench.single import measure
from tools.bench.turns import BATCH, WORKERS_DEFAULT
from tools.terminal import ROOT

BUILD: Final = ROOT / "build" / "bench"
DOCUMENT: Final = ROOT / "docs" / "benchmarks.md"
NOTES: Final = ROOT / "docs" / "benchmarks-notes.md"

PARTS: Final = ("loader-service", "numpy", "lmdb", "pyzmq", "simplejpeg")


def chosen_peers(names: str) -> list[str]:
    """Return the peers that an option names: ``none``, ``all`` or names with commas between.

    Raises:
        click.BadParameter: there is no such peer.
    """
    if names == "none":
        return []
    wanted = list(PEERS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in PEERS:
            raise click.BadParameter(f"there is no peer {name!r}; there are {', '.join(PEERS)}", param_hint="--peers")
    return wanted


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--peers",
    "peer_names",
    default="all",
    show_default=True,
    help="Other loaders to measure: none, all, or names with commas between.",
)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Turns of each contestant.")
@click.option("--seconds", default=1.5, show_default=True, type=click.FloatRange(0.01), help="Length of a turn.")
@click.option("--records", default=8192, show_default=True, type=click.IntRange(2 * BATCH), help="Number of records.")
@click.option(
    "--workers",
    default=WORKERS_DEFAULT,
    show_default=True,
    type=click.IntRange(1),
    help="Worker processes or threads of every contestant.",
)
@click.option(
    "--photographs",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or archive of photographs that records are cut from.",
)
@click.option("--single/--no-single", default=True, help="Also measure start-up, memory and preprocessing.")
@click.option("--build", default=BUILD, type=click.Path(path_type=Path), help="Folder of records and results.")
@click.option("--document", default=DOCUMENT, type=click.Path(path_type=Path), help="Document to write.")
def main(
    peer_names: str,
    rounds: int,
    seconds: float,
    records: int,
    workers: int,
    photographs: Path | None,
    single: bool,
    build: Path,
    document: Path,
) -> None:
    """Compare this project with the limits of the machine and with other loaders; write docs/benchmarks.md."""
    wanted, found = chosen_peers(peer_names), photographs or find_source()
    missing, pythons = dict[str, str](), dict[str, Path]()
    for peer in wanted:
        click.echo(f"environment of {peer}", err=True)
        try:
            pythons[peer] = python_of(peer, ROOT)
        except NotInstalled as error:
            missing[peer] = str(error)  # the document names it; the others are measured
    folder = build.resolve() / f"records-{records}"  # one folder for each number: make() keeps what exists
    facts = make(folder, found, records)  # kept from an earlier run, if they are finished
    # The order of groups follows: raw, TCP, jpeg, and then the peers that are apart.
    contestants = limits(folder, workers) + ours(folder, workers) + peers(folder, workers, pythons)
    # Over a minute: shows whether anything else ran before the first round.
    before = os.getloadavg()[0]
    turns = play(contestants, rounds, seconds, missing)
    after = os.getloadavg()[0]
    results = Results(
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        machine=machine(),
        versions={"here": _own_versions()} | {peer: versions(peer) for peer in pythons},
        load=(before, after),
        records=facts,
        workers=workers,
        seconds=seconds,
        contestants=[each for each in contestants if each.name in turns],  # without the peers that failed
        rounds=turns,
        single=measure(folder, found, workers) if single else None,
        missing=missing,
    )
    (build / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(markdown(results, NOTES.read_text() if NOTES.exists() else ""))
    (document.parent / CHART).write_text(chart(results))
    click.echo(f"wrote {document}, its chart and {build / 'results.json'}")


def _own_versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{part} {version(part)}" for part in PARTS)])


if __name__ == "__main__":
    main()
