"""The cost of comparing records with their checksums, as a share of the CPU time that a sample takes in a worker.

    python -m tools.bench.checksums [--records 1024] [--rounds 9]

One process fills slices of records in memory, as a worker does. Slices with and without the comparison alternate, so that
both see the same machine. A node compares a raw record once: that first time has a row of its own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

import click

from loader_service.cli.job import CONTEXT, Job
from loader_service.data import records as comparing
from loader_service.data.augment import complete_view
from loader_service.data.checksums import Checked
from loader_service.data.codecs import centre_of, encode_centred
from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import Records
from loader_service.data.writer import Writer
from loader_service.types import SampleLayout, SliceId, View
from tools.bench.records import find_source, make
from tools.bench.turns import BATCH

FIRST: Final = "raw, first time"
ROWS: Final = {"raw": "raw", FIRST: "raw", "jpeg": "jpeg", "centered": "centered"}
"""The rows, and the codec of each."""

ROUNDS: Final = 9


@contextmanager
def nothing_compared() -> Iterator[None]:
    """Compare nothing until the block ends."""
    # Plain functions: a Mock takes longer to call than a comparison.
    with (
        patch.object(comparing, "matches", lambda *_: True),
        patch.object(Checked, "missing", lambda *_: []),
    ):
        yield


class Filler:
    """Fills slice after slice of an environment, in another order each epoch."""

    def __init__(self, records: Records) -> None:
        self._records = records
        view = complete_view(View(), records.statistics)
        self._out = empty_slice(SampleLayout(view, "uint8"), BATCH)
        starts = range(0, len(records) - BATCH + 1, BATCH)
        self.slices = len(starts)
        self._slices = (SliceId(view, 1, epoch, start, BATCH) for epoch in range(2**30) for start in starts)

    def seconds(self) -> float:
        """Fill the next slice; return the seconds of CPU time that it took, which other processes disturb less."""
        what = next(self._slices)
        start = time.thread_time()
        fill(self._out, self._records, what)
        return time.thread_time() - start


def cost(path: Path, row: str, rounds: int) -> list[float]:
    """Return, for each round, the CPU time of slices with the comparison over that of those without, minus 1."""
    costs = []
    with ExitStack() as stack:
        if row == FIRST:  # nothing is noted, so every time is the first
            stack.enter_context(patch.object(Checked, "add", lambda *_: None))
        filler = Filler(stack.enter_context(Records(path)))
        for _ in range(filler.slices):  # maps every page, and compares every raw record
            filler.seconds()
        for _ in range(rounds):
            compared = plain = 0.0
            for _ in range(filler.slices):
                compared += filler.seconds()
                with nothing_compared():
                    plain += filler.seconds()
            costs.append(compared / plain - 1)
    return costs


def write_centered(raw: Path, path: Path) -> None:
    """Write the records of a raw environment as centered records."""
    with Records(raw) as records, Writer(path, codec="centered", class_names=records.manifest.class_names) as writer:
        centre = centre_of(records.statistics.mean_image)
        for number in range(len(records)):
            label, pixels = records.pixels(number)
            writer.put(label, encode_centred(pixels, centre), str(number))
        writer.finish(records.statistics, made_by={"made by": "tools.bench"})


def costs(source: Path, records: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Make records from photographs; return the cost in each round, by row."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as name:
        folder = Path(name)
        make(folder, source, records)
        write_centered(folder / "raw" / "train.lmdb", folder / "centered" / "train.lmdb")
        return {row: cost(folder / codec / "train.lmdb", row, rounds) for row, codec in ROWS.items()}


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--records", default=1024, show_default=True, type=click.IntRange(BATCH), help="Number of records.")
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(1), help="Rounds over all records.")
@click.option(
    "--photographs",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or archive of photographs that records are cut from.",
)
def main(records: int, rounds: int, photographs: Path | None) -> None:
    """Measure the cost of comparing records with their checksums."""
    for row, found in costs(photographs or find_source(), records, rounds).items():
        click.echo(
            f"{row}: {statistics.median(found):.2%} ({min(found):.2%} to {max(found):.2%}) of a sample's CPU time"
        )


if __name__ == "__main__":
    main()
