"""The rate of one process, and of two, at making samples of raw records in memory: each form of the kernel, and a bare memcpy.

    python -m tools.bench.studies.kernel [--records 8192] [--rounds 9] [--seconds 0.25]

The contestants take turns, round by round, over the same shuffled records into the same four batches of shared memory. A
ratio is the median over the rounds of a contestant's rate divided by memcpy's in the same round.
"""

from __future__ import annotations

import mmap
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from loader_service.data import kernel
from loader_service.data.augment import augment_records, complete_view
from loader_service.data.codecs import RAW_BYTES, SHAPE
from loader_service.data.draws import draw
from loader_service.data.fill import fill
from loader_service.data.manifest import Statistics
from loader_service.data.order import records_at
from loader_service.data.records import Records
from loader_service.data.writer import Writer
from loader_service.types import DRAWS, SampleLayout, Slice, SliceId, View
from tools.bench.limits import copy_crops, first_pixels
from tools.bench.report.document import cpu_name

BATCH: Final = 128
BATCHES: Final = 4
SEED: Final = 1
LIMIT: Final = "memcpy"
FILL: Final = "fill: order, draws, look-up, kernel"


def write_records(path: Path, count: int) -> None:
    """Write a dataset of ``count`` raw records, no two alike."""
    # (2 * RAW_BYTES,) uint8; each record is a window of RAW_BYTES of it.
    noise = np.random.Generator(np.random.Philox(SEED)).integers(0, 256, 2 * RAW_BYTES, np.uint8).data
    mean = np.full(SHAPE, 128, np.float32)
    # Eigenvalues of ImageNet's colours in 0..1, so that shifts have their usual size.
    facts = Statistics(mean, np.full(3, 128.0), np.eye(3) / 16, np.array([0.2281, 0.0212, 0.0060]), np.eye(3))
    with Writer(path, codec="raw", class_names=("noise",)) as writer:
        for number in range(count):
            start = number * 7919 % RAW_BYTES  # a prime step: no two records begin at the same byte of the noise
            writer.put(0, noise[start : start + RAW_BYTES], str(number))
        writer.finish(facts, made_by={"made by": "tools.bench.studies.kernel"})


@dataclass(frozen=True)
class PreparedBatch:
    """A batch's inputs, looked up before the clock starts.

    Fields:
        what: identity of the slice.
        numbers: (128,) record numbers.
        draws: (128,) DRAWS.
        values: stored records.
        addresses: (128,) addresses of the crops' first pixels.
    """

    what: SliceId
    numbers: npt.NDArray[np.int64]
    draws: npt.NDArray[np.void]
    values: list[memoryview]
    addresses: npt.NDArray[np.uint64]


class Contestants:
    """The contestants, by their names in :data:`NAMES`; all use the same records and the same memory."""

    def __init__(self, records: Records, stored: list[memoryview]) -> None:
        self._records = records
        view = complete_view(View(), records.statistics)
        memory = mmap.mmap(-1, BATCHES * BATCH * SampleLayout(view, "uint8").image_bytes)  # shared, as a slot is
        images = np.frombuffer(memory, np.uint8).reshape(BATCHES, BATCH, *view.shape)
        images[...] = 0  # maps every page now
        self._images = cycle(images)
        self._floats = cycle(np.full((BATCHES, BATCH, *view.shape), 0, np.float32))  # np.full: np.zeros maps no pages
        # (128,) labels; (1,) number of the current record.
        self._labels, self._at = np.zeros(BATCH, np.int64), np.zeros(1, np.int64)
        self.batches = cycle([self._batch(view, start, stored) for start in range(0, len(records) - BATCH + 1, BATCH)])

    def _batch(self, view: View, start: int, stored: list[memoryview]) -> PreparedBatch:
        numbers = records_at(len(stored), SEED, 0, start, BATCH)
        draws = draw(view, SEED, 0, start, BATCH)
        # Looked up here, outside the clock; FILL alone does its own look-ups, which are part of its work.
        values = [stored[number] for number in numbers.tolist()]
        return PreparedBatch(SliceId(view, SEED, 0, start, BATCH), numbers, draws, values, first_pixels(values, draws))

    def run(self, name: str, batch: PreparedBatch) -> None:
        """Make one batch with a contestant."""
        if name == LIMIT:
            copy_crops(next(self._images), batch.addresses)
        elif name == FILL:
            fill(Slice(next(self._images), self._labels, np.empty(BATCH, DRAWS)), self._records, batch.what, self._at)
        else:
            form, _, dtype = name.partition(", ")  # "avx512" or "avx512, float32"
            images, mean = (next(self._floats), self._records.mean_pair) if dtype else (next(self._images), None)
            arguments = (batch.values, batch.draws, self._labels, batch.numbers, self._at, mean)
            augment_records(images, *arguments, form=form)


NAMES: Final = (LIMIT, FILL, *kernel.FORMS, f"{kernel.FORMS[0]}, float32")


def serve(path: Path) -> None:
    """Run one process of the measurement: for each line ``SECONDS NAME``, run that contestant and print images/s."""
    # The transaction stays open for the whole run: the batches hold views of its pages.
    with Records(path) as records, records.values() as values:
        contestants = Contestants(records, values.stored(np.arange(len(records))))
        for batch in (next(contestants.batches) for _ in range(len(records) // BATCH)):
            contestants.run(LIMIT, batch)  # maps every page before the clock starts
        click.echo("ready")
        for line in sys.stdin:
            seconds, name = line.rstrip("\n").split(" ", 1)
            made, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < float(seconds):
                contestants.run(name, next(contestants.batches))
                made += BATCH
            click.echo(made / passed)


@contextmanager
def processes(path: Path, n: int) -> Iterator[Callable[[str, float], float]]:
    """Start ``n`` processes; yield ``rate(name, seconds)``, images/s of all of them together."""
    command = [sys.executable, "-m", "tools.bench.studies.kernel", "--serve", str(path)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n)]

    def answers() -> list[str]:
        # "" at the end of file: the process has ended.
        lines = [child.stdout.readline().strip() if child.stdout else "" for child in started]
        if not all(lines):
            raise click.ClickException("a measuring process ended before it answered; its message is above")
        return lines

    def rate(name: str, seconds: float) -> float:
        # All get the line before any answer is read, so that they run at the same time.
        for child in started:
            assert child.stdin is not None
            child.stdin.write(f"{seconds} {name}\n")
            child.stdin.flush()
        return sum(float(line) for line in answers())

    try:
        answers()
        yield rate
    finally:
        for child in started:
            child.kill()
            child.communicate()


def measure(path: Path, n: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return images/s of each contestant in each round, of ``n`` processes together."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    with processes(path, n) as rate:
        for _ in range(rounds):
            for name in NAMES:
                rates[name].append(rate(name, seconds))
    return rates


def table(n: int, rates: dict[str, list[float]]) -> Table:
    """Return a table for ``n`` processes: median rates, and the median, lowest and highest ratio to memcpy."""
    shown = Table("", "images/s", f"x {LIMIT}", "from", "to", title=f"{n} process{'es' if n > 1 else ''}")
    for name, measured in rates.items():
        ratios = [rate / limit for rate, limit in zip(measured, rates[LIMIT], strict=True)]  # within a round
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        shown.add_row(name, f"{statistics.median(measured):,.0f}", *(f"{figure:.2f}" for figure in figures))
    return shown


@click.command()
@click.option(
    "--records", default=8192, show_default=True, type=click.IntRange(BATCH), help="Number of records to make."
)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Turns of each contestant.")
@click.option("--seconds", default=0.25, show_default=True, type=click.FloatRange(0.01), help="Length of a turn.")
@click.option("--serve", "served", hidden=True, type=click.Path(path_type=Path))
def main(records: int, rounds: int, seconds: float, served: Path | None) -> None:
    """Compare the kernel with a bare memcpy of the same crops."""
    if served:
        serve(served)
        return
    console = Console()
    with tempfile.TemporaryDirectory(prefix="kernel-bench-") as directory:
        path = Path(directory) / "records.lmdb"
        with console.status(f"writing {records:,} records ({records * RAW_BYTES / 2**30:.1f} GiB)"):
            write_records(path, records)
        console.print(f"{cpu_name()}, Python {platform.python_version()}, NumPy {np.__version__}, {records:,} records")
        for n in (1, 2):
            with console.status(f"measuring with {n}"):
                rates = measure(path, n, rounds, seconds)
            console.print(table(n, rates))


if __name__ == "__main__":
    main()
