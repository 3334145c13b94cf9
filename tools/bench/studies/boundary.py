"""The time between two epochs: from an epoch's last batch to the first one of the next.

python -m tools.bench.studies.boundary [--records build/bench/records-8192/raw] [--workers 2] [--epochs 10]

A loop takes batches of 128 at a steady pace, as training does, and the time that it waits for each is noted: for the first
batch of an epoch with the end of the loop before and the start of its own, for the others inside of an epoch. Batches are
prefetched across the boundary, so both are the time to hand out a batch that is ready. `make bench` takes this measurement.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Final

import click
import msgspec

from loader_service import Loader, LocalNode
from loader_service.cli.job import CONTEXT, Job
from tools.bench.turns import BATCH, WORKERS_DEFAULT
from tools.errors import ToolFailed

STEP_S: Final = 0.01
"""Time of a step: several times that of a batch, so that a wait is no lack of batches."""

EPOCHS: Final = 10


class Boundary(msgspec.Struct, frozen=True):
    """The figures.

    Fields:
        between_ms: milliseconds from the call after an epoch's last batch to the first batch of the next, of each epoch.
        within_ms: milliseconds of each call inside of an epoch.
    """

    between_ms: list[float]
    within_ms: list[float]

    def __str__(self) -> str:
        between, within = sorted(self.between_ms), sorted(self.within_ms)
        return (
            f"from an epoch's last batch to the next one's first: {statistics.median(between):.2f} ms "
            f"(at most {between[-1]:.2f} in {len(between)} epochs); between two batches of an epoch: "
            f"{statistics.median(within):.2f} ms"
        )


def measure(data: Path, workers: int, epochs: int = EPOCHS) -> Boundary:
    """Take the times of ``epochs`` boundaries."""
    between, within = list[float](), list[float]()
    pause = threading.Event()
    with LocalNode(data, workers) as node, Loader(node.address, batch_size=BATCH) as loader:
        for epoch in range(epochs + 1):
            start_s, first = time.perf_counter(), True
            for batch in loader:
                took_ms = 1e3 * (time.perf_counter() - start_s)
                if not first:
                    within.append(took_ms)
                elif epoch:  # the very first batch is the start-up's
                    between.append(took_ms)
                first = False
                del batch
                pause.wait(STEP_S)
                start_s = time.perf_counter()
    return Boundary(between, within)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--records", type=click.Path(path_type=Path), default=Path("build/bench/records-8192/raw"), show_default=True
)
@click.option("--workers", type=click.IntRange(1), default=WORKERS_DEFAULT, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=EPOCHS, show_default=True)
def main(records: Path, workers: int, epochs: int) -> None:
    """Print the time between two epochs beside that between two batches."""
    if not (records / "train.lmdb").exists():
        raise ToolFailed(f"there are no records in {records}; make bench makes them.")
    click.echo(str(measure(records, workers, epochs)))


if __name__ == "__main__":
    main()
