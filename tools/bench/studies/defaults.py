"""``python -m tools.bench.studies.defaults``: each default beside what it might be instead, one at a time, on this machine.

For every way that batches go, a setting's values take turns; what is told of a value are its ratios to the default in the
same rounds. A run may be cut short, or be one setting's alone (``--only``): what was measured on this machine before is
kept in ``build/bench/defaults.json``, and docs/defaults.md is written from all of it.
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
"""How batches go: a title, the records, and options of ``tools.bench.ours``."""

PLAIN: Final = ("raw-shm", "raw-tcp", "jpeg-shm")
FRAMES: Final = ("raw-tcp", "raw-curve")


class Setting(msgspec.Struct, frozen=True):
    """Something that has a default.

    Fields:
        title: for people.
        values: what it might be, and how ``tools.bench.ours`` is told.
        default: the one of the values that it is.
        ways: those that it can matter to.
    """

    title: str
    values: Mapping[str, tuple[str, ...]]
    default: str
    ways: tuple[str, ...] = PLAIN


def _constant(title: str, name: str, others: tuple[int, ...], ways: tuple[str, ...] = PLAIN) -> Setting:
    """A setting that is a number of ``loader_service.defaults``."""
    default: int = getattr(defaults, name)
    values = {str(value): ("--defaults", f"{name}={value}") for value in sorted({default, *others})}
    return Setting(f"{title}: `{name}`", values, str(default), ways)


SETTINGS: Final[Mapping[str, Setting]] = {
    "prefetch": _constant("Batches ahead", "PREFETCH", (2, 8)),
    "spares": _constant("Slots beside those", "SPARE_SLOTS", (1, 4), ("raw-shm",)),
    "slices": _constant("Slices of the batches ahead, for each worker", "SLICES_PER_WORKER", (1, 4, 8)),
    "send-slots": _constant(
        "A node's slots for frames, for each worker", "SEND_SLOTS_PER_WORKER", (1, 2, 6), FRAMES[:1]
    ),
    "connections": _constant("Connections, and I/O threads at either end", "CONNECTIONS", (2, 4), FRAMES),
    "io-threads": Setting(
        "I/O threads of the node alone, with as many connections as by default",
        {str(count): ("--io-threads", str(count)) for count in sorted({defaults.CONNECTIONS, 1, 2})},
        str(defaults.CONNECTIONS),
        FRAMES,
    ),
    "affinity": Setting(
        "Workers and CPUs", {"left to the scheduler": (), "a CPU each": ("--pinned",)}, "left to the scheduler"
    ),
    "workers": Setting(
        "Workers, of a node beside its client",
        {str(count): ("--workers", str(count)) for count in sorted({defaults.WORKERS, 1, 2, 4})},
        str(defaults.WORKERS),
    ),
}


class Cell(msgspec.Struct, frozen=True):
    """One setting in one way, measured.

    Fields:
        date: UTC, as people write it.
        machine: what it ran on.
        seconds: of each turn.
        rounds: the turns of each value.
    """

    date: str
    machine: str
    seconds: float
    rounds: Rounds


Cells = dict[str, dict[str, Cell]]
"""By setting, by way."""


def contestants(setting: Setting, way: str, records: Path) -> list[Contestant]:
    """One for each value of a setting, named by it."""
    title, codec, options = WAYS[way]
    command = (sys.executable, "-m", "tools.bench.ours", str(records / codec), *options)
    return [Contestant(value, title, codec, Kind.OURS, (*command, *more)) for value, more in setting.values.items()]


def load(path: Path) -> Cells:
    """What was measured on this machine before, of values that are still compared."""
    if not path.exists():
        return {}
    try:
        cells = msgspec.json.decode(path.read_bytes(), type=Cells)
    except msgspec.DecodeError as error:
        raise ToolFailed(f"{path} is not what this command has written ({error}); remove it.") from error
    return {
        name: {way: cell for way, cell in found.items() if _holds(name, way, cell)} for name, found in cells.items()
    }


def _holds(name: str, way: str, cell: Cell) -> bool:
    setting = SETTINGS.get(name)
    return (
        setting is not None
        and way in setting.ways
        and cell.machine == machine()
        and set(cell.rounds) == set(setting.values)
    )


def markdown(cells: Cells, notes: str) -> str:
    """The whole document."""
    every = [cell for found in cells.values() for cell in found.values()]
    dates = sorted(cell.date for cell in every)
    rounds = sorted({len(turns) for cell in every for turns in cell.rounds.values()})
    parts = [
        "# Defaults",
        "Written by `python -m tools.bench.studies.defaults`; do not edit, but for defaults-notes.md, which is the last section.",
        f"""- Measured {dates[0]} to {dates[-1]}, UTC, on {every[0].machine}.
- Batches of {BATCH}, (224, 224, 3) uint8 in the consumer's memory, a byte of every page read; {WORKERS_DEFAULT} workers, where
  nothing else is said; the records of [the benchmark](benchmarks.md), in memory.
- A table's values take turns, {" or ".join(map(str, rounds))} rounds of {" or ".join(sorted({f"{cell.seconds:g}" for cell in every}))} s.
  Of each value but the default: its rate by the default's in the same round; and its CPU time per image by the default's.
- Medians over the rounds, with the least and the greatest in brackets.""",
    ]
    for name, setting in SETTINGS.items():
        if found := cells.get(name):
            parts += [f"## {setting.title}", table(setting, found)]
    return "\n\n".join([*parts, notes.strip()]).rstrip() + "\n"


def table(setting: Setting, found: Mapping[str, Cell]) -> str:
    """A setting's values as rows, the ways that were measured as columns."""
    ways = [way for way in setting.ways if way in found]
    rows = [f"| | {' | '.join(WAYS[way][0] for way in ways)} |", "| --- " * (len(ways) + 1) + "|"]
    for value in setting.values:
        label = f"**{value}**" if value == setting.default else value
        figures = (_figure(found[way].rounds[value], found[way].rounds[setting.default]) for way in ways)
        rows.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _figure(turns: list[Turn], of_default: list[Turn]) -> str:
    if turns == of_default:
        return f"{shown(spread([turn.images_per_s for turn in turns]), ',.0f')} images/s"
    pairs = list(zip(turns, of_default, strict=True))
    rate = spread([turn.images_per_s / default.images_per_s for turn, default in pairs])
    cpu = statistics.median(turn.cpu_ms / default.cpu_ms for turn, default in pairs)
    return f"{shown(rate, '.2f')}; CPU {cpu:.2f}"


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--only", "names", multiple=True, type=click.Choice(list(SETTINGS)), help="These settings; may be repeated."
)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="These ways; may be repeated.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Turns of each value.")
@click.option("--seconds", default=0.4, show_default=True, type=click.FloatRange(0.01), help="Length of a turn.")
@click.option("--records", default=RECORDS, type=click.Path(path_type=Path), help="As make bench makes them.")
@click.option("--build", default=BUILD, type=click.Path(path_type=Path), help="Where figures are kept.")
@click.option("--document", default=DOCUMENT, type=click.Path(path_type=Path), help="Where the document goes.")
def main(
    names: tuple[str, ...],
    ways: tuple[str, ...],
    rounds: int,
    seconds: float,
    records: Path,
    build: Path,
    document: Path,
) -> None:
    """Compare each default with what it might be, and write docs/defaults.md."""
    for codec in ("raw", "jpeg"):
        if not (records / codec / "train.lmdb").exists():
            raise ToolFailed(f"there are no {codec} records in {records}; make bench makes them.")
    build.mkdir(parents=True, exist_ok=True)
    kept = build / "defaults.json"
    cells = load(kept)
    chosen = [(name, way) for name in names or SETTINGS for way in SETTINGS[name].ways if not ways or way in ways]
    if not chosen:
        raise ToolFailed("that setting does not matter to that way; leave --way out.")
    for number, (name, way) in enumerate(chosen):
        click.echo(f"{name}, {way} ({number + 1} of {len(chosen)})", err=True)
        turns = play(contestants(SETTINGS[name], way, records), rounds, seconds, {})
        date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"
        cells.setdefault(name, {})[way] = Cell(date, machine(), seconds, turns)
        kept.write_bytes(msgspec.json.format(msgspec.json.encode(cells)))
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(markdown(cells, NOTES.read_text() if NOTES.exists() else ""))
    click.echo(f"wrote {document} and {kept}")


if __name__ == "__main__":
    main()
