"""``python -m tools.bench.studies.defaults``: each default compared with other values, one setting at a time.

For each codec and transport, the values of a setting take turns; a value is reported as its ratio to the default in the
same rounds. A run may be interrupted or limited to some settings (``--only``): earlier results of this machine are kept in
``build/bench/defaults.json``, and docs/defaults.md is written from all of them.
"""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click
import msgspec

from loader_service import defaults
from loader_service.cli.job import CONTEXT, Job
from tools.bench.contest import Contestant, Kind, Rounds, Turn, play
from tools.bench.report.document import machine, shown
from tools.bench.report.targets import spread
from tools.bench.turns import BATCH, WORKERS_DEFAULT
from tools.errors import ToolFailed
from tools.terminal import ROOT

BUILD: Final = ROOT / "build" / "bench"
RECORDS: Final = BUILD / "records-8192"
DOCUMENT: Final = ROOT / "docs" / "defaults.md"
NOTES: Final = ROOT / "docs" / "defaults-notes.md"

WAYS: Final[Mapping[str, tuple[str, str, tuple[str, ...]]]] = {
    "raw-shm": ("raw, shared memory", "raw", ()),
    "raw-tcp": ("raw, TCP", "raw", ("--transport", "tcp")),
    "raw-curve": ("raw, TCP with CURVE", "raw", ("--transport", "tcp", "--curve")),
    "jpeg-shm": ("jpeg, shared memory", "jpeg", ()),
}
"""Codec and transport of batches: a title, the records' codec, and options of ``tools.bench.ours``."""

PLAIN: Final = ("raw-shm", "raw-tcp", "jpeg-shm")
FRAMES: Final = ("raw-tcp", "raw-curve")


class Setting(msgspec.Struct, frozen=True):
    """A setting with a default.

    Fields:
        title: name for people.
        values: values to compare, each with its options of ``tools.bench.ours``.
        default: the value that is the default.
        ways: keys of WAYS that the setting can affect.
    """

    title: str
    values: Mapping[str, tuple[str, ...]]
    default: str
    ways: tuple[str, ...] = PLAIN


def _constant(title: str, name: str, others: tuple[int, ...], ways: tuple[str, ...] = PLAIN) -> Setting:
    """Return a setting that is a number in ``loader_service.defaults``."""
    default: int = getattr(defaults, name)
    # A set: some defaults depend on the number of CPUs, so here one may be among the others.
    values = {str(value): ("--defaults", f"{name}={value}") for value in sorted({default, *others})}
    return Setting(f"{title}: `{name}`", values, str(default), ways)


SETTINGS: Final[Mapping[str, Setting]] = {
    "prefetch": _constant("Prefetched batches", "PREFETCH", (2, 8)),
    "spares": _constant("Spare slots", "SPARE_SLOTS", (1, 4), ("raw-shm",)),
    "slices": _constant("Slices of the prefetched batches per worker", "SLICES_PER_WORKER", (1, 4, 8)),
    "send-slots": _constant("Send slots of a node per worker", "SEND_SLOTS_PER_WORKER", (1, 2, 6), FRAMES[:1]),
    "connections": _constant("Connections, and I/O threads at each end", "CONNECTIONS", (1, 2, 4), FRAMES),
    "io-threads": Setting(
        "I/O threads of the node, with the default number of connections",
        # As above: CONNECTIONS depends on the number of CPUs.
        {str(count): ("--io-threads", str(count)) for count in sorted({defaults.CONNECTIONS, 1, 2})},
        str(defaults.CONNECTIONS),
        FRAMES,
    ),
    "affinity": Setting(
        "CPU affinity of workers", {"left to the kernel": (), "one CPU each": ("--pinned",)}, "left to the kernel"
    ),
    "workers": Setting(
        "Workers of a node on its client's machine",
        {str(count): ("--workers", str(count)) for count in sorted({defaults.WORKERS, 1, 2, 4})},
        str(defaults.WORKERS),
    ),
}


class Cell(msgspec.Struct, frozen=True):
    """The measurement of one setting with one codec and transport.

    Fields:
        date: UTC, for people.
        machine: machine of the run, for people.
        seconds: length of a turn.
        rounds: turns of each value.
    """

    date: str
    machine: str
    seconds: float
    rounds: Rounds


Cells = dict[str, dict[str, Cell]]
"""Measurements by setting and way."""


def contestants(setting: Setting, way: str, records: Path) -> list[Contestant]:
    """Return a contestant for each value of a setting, named after the value."""
    title, codec, options = WAYS[way]
    command = (sys.executable, "-m", "tools.bench.ours", str(records / codec), *options)
    # One group, the empty one: all values of a setting run at once and take turns.
    return [Contestant(value, title, codec, Kind.OURS, (*command, *more)) for value, more in setting.values.items()]


def load(path: Path) -> Cells:
    """Read the earlier measurements of this machine whose values are still compared.

    Raises:
        ToolFailed: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        cells = msgspec.json.decode(path.read_bytes(), type=Cells)
    except msgspec.DecodeError as error:
        raise ToolFailed(f"{path} was not written by this command ({error}); remove it.") from error
    return {
        name: {way: cell for way, cell in found.items() if _holds(name, way, cell)} for name, found in cells.items()
    }


def _holds(name: str, way: str, cell: Cell) -> bool:
    setting = SETTINGS.get(name)
    return (
        setting is not None
        and way in setting.ways
        and cell.machine == machine()  # ratios of two machines do not belong in one table
        and set(cell.rounds) == set(setting.values)  # the values to compare have not changed since
    )


def markdown(cells: Cells, notes: str) -> str:
    """Return the whole document."""
    every = [cell for found in cells.values() for cell in found.values()]
    dates = sorted(cell.date for cell in every)  # YYYY-MM-DD HH:MM sorts as text
    rounds = sorted({len(turns) for cell in every for turns in cell.rounds.values()})
    parts = [
        "# Defaults",
        "Written by `python -m tools.bench.studies.defaults`. Do not edit; the last section is defaults-notes.md.",
        f"""- Measured {dates[0]} to {dates[-1]}, UTC, on {every[0].machine}.
- Batches of {BATCH} images, (224, 224, 3) uint8, in the consumer's memory; a byte of every page is read. {WORKERS_DEFAULT} workers
  unless a table says otherwise; the records of [the benchmark](benchmarks.md), in memory.
- The values of a table take turns, {" or ".join(map(str, rounds))} rounds of {" or ".join(sorted({f"{cell.seconds:g}" for cell in every}))} s.
  For the default: its rate. For other values: rate and CPU time per image, divided by the default's in the same round.
- Medians over the rounds, with the lowest and the highest in brackets.""",
    ]
    for name, setting in SETTINGS.items():
        if found := cells.get(name):
            parts += [f"## {setting.title}", table(setting, found)]
    return "\n\n".join([*parts, notes.strip()]).rstrip() + "\n"


def table(setting: Setting, found: Mapping[str, Cell]) -> str:
    """Return a table with the setting's values as rows and the measured ways as columns."""
    ways = [way for way in setting.ways if way in found]
    rows = [f"| | {' | '.join(WAYS[way][0] for way in ways)} |", "| --- " * (len(ways) + 1) + "|"]
    for value in setting.values:  # the setting's order, not the one in the file
        label = f"**{value}**" if value == setting.default else value
        figures = (_figure(found[way].rounds[value], found[way].rounds[setting.default]) for way in ways)
        rows.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _figure(turns: list[Turn], of_default: list[Turn]) -> str:
    if turns == of_default:  # the default itself: a ratio would be 1
        return f"{shown(spread([turn.images_per_s for turn in turns]), ',.0f')} images/s"
    pairs = list(zip(turns, of_default, strict=True))  # turns of the same round
    rate = spread([turn.images_per_s / default.images_per_s for turn, default in pairs])
    cpu = statistics.median(turn.cpu_ms / default.cpu_ms for turn, default in pairs)
    return f"{shown(rate, '.2f')}; CPU {cpu:.2f}"


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice(list(SETTINGS)),
    help="Settings to measure; repeatable.  [default: all]",
)
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice(list(WAYS)),
    help="Codecs and transports to measure; repeatable.  [default: all]",
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Turns of each value.")
@click.option("--seconds", default=0.4, show_default=True, type=click.FloatRange(0.01), help="Length of a turn.")
@click.option(
    "--records", default=RECORDS, type=click.Path(path_type=Path), help="Folder of records, made by make bench."
)
@click.option("--build", default=BUILD, type=click.Path(path_type=Path), help="Folder of results.")
@click.option("--document", default=DOCUMENT, type=click.Path(path_type=Path), help="Document to write.")
def main(
    names: tuple[str, ...],
    ways: tuple[str, ...],
    rounds: int,
    seconds: float,
    records: Path,
    build: Path,
    document: Path,
) -> None:
    """Compare each default with other values; write docs/defaults.md."""
    for codec in ("raw", "jpeg"):
        if not (records / codec / "train.lmdb").exists():
            raise ToolFailed(f"there are no {codec} records in {records}; make bench makes them.")
    build.mkdir(parents=True, exist_ok=True)
    kept = build / "defaults.json"
    # Before the first measurement: a damaged file must not cost the run.
    cells = load(kept)
    chosen = [(name, way) for name in names or SETTINGS for way in SETTINGS[name].ways if not ways or way in ways]
    if not chosen:
        raise ToolFailed("that setting does not affect that way; leave --way out.")
    for number, (name, way) in enumerate(chosen):
        click.echo(f"{name}, {way} ({number + 1} of {len(chosen)})", err=True)
        # Ours only, whose failure is an error: `missing` stays empty.
        turns = play(contestants(SETTINGS[name], way, records), rounds, seconds, {})
        date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"
        cells.setdefault(name, {})[way] = Cell(date, machine(), seconds, turns)
        # After every setting: an interrupted run keeps what it has measured.
        kept.write_bytes(msgspec.json.format(msgspec.json.encode(cells)))
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(markdown(cells, NOTES.read_text() if NOTES.exists() else ""))
    click.echo(f"wrote {document} and {kept}")


if __name__ == "__main__":
    main()
