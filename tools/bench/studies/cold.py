"""Reading records that are not in memory, where the disk is the bottleneck.

python -m tools.bench.studies.cold [--records build/bench/records-8192] [--workers 2] [--rounds 5]

Before each turn the environment's pages are dropped from memory. Workers fill slices of 128, as a node's workers do, from
the first part of a shuffled epoch: with read-ahead, and without. The limit reads the same records with many threads at
their offsets in the file, without LMDB. Prints the table of docs/benchmarks-notes.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from loader_service.cli.job import CONTEXT, Job
from loader_service.data.augment import complete_view
from loader_service.data.fill import empty_slice, fill, slice_numbers
from loader_service.data.records import Records
from loader_service.types import SampleLayout, SliceId, View
from tools.bench.turns import BATCH, WORKERS_DEFAULT
from tools.errors import ToolFailed
from tools.terminal import ROOT

SLICES: Final = 12
"""Slices per worker and turn: 1,536 records, 0.3 GB raw."""

THREADS: Final = 16
"""Threads of the limit; more were no faster on any disk measured."""


class Mode(StrEnum):
    """The ways of reading."""

    AHEAD = "ahead"
    TOUCHING = "touching"
    DISK = "disk"


TITLES: Final = {
    Mode.AHEAD: "this project: a slice's records asked for at once",
    Mode.TOUCHING: "without read-ahead: LMDB touches pages",
    Mode.DISK: "limit: pread of the same records",
}


class NoReadAhead:
    """A stand-in for the records' read-ahead that does nothing."""

    def __init__(self, records: Records) -> None:
        self.close = records.ahead.close  # Records.close() calls it: the file is still open

    def ask(self, numbers: npt.NDArray[np.int64]) -> None:
        """Ask for nothing."""

    def learn(self, records: int, seconds: float) -> None:
        """Learn nothing."""


def forget(path: Path) -> None:
    """Drop a file's pages from memory; it works only while no process has them mapped."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # dirty pages would stay: DONTNEED drops clean ones only
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--records", type=click.Path(path_type=Path), default=ROOT / "build" / "bench" / "records-8192")
@click.option("--workers", type=click.IntRange(1), default=WORKERS_DEFAULT, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--turn", type=(click.Choice(list(Mode)), click.Path(path_type=Path), int, int), hidden=True)
def main(records: Path, workers: int, rounds: int, turn: tuple[Mode, Path, int, int] | None) -> None:
    """Measure images per second from a disk: all workers together, medians of interleaved rounds."""
    if turn:
        take_turn(Mode(turn[0]), *turn[1:])
        return
    rates: dict[tuple[str, Mode], list[float]] = {}
    for number in range(rounds):
        for codec in ("raw", "jpeg"):
            data = records / codec / "train.lmdb"
            if not data.exists():
                raise ToolFailed(f"there are no records in {data}; make bench makes them.")
            for mode in Mode:
                # number * workers is the seed: another order in each round, the same for all modes of a round.
                rates.setdefault((codec, mode), []).append(_measure(mode, data, workers, number * workers))
                click.echo(
                    f"round {number + 1} of {rounds}: {codec}, {TITLES[mode]}: {rates[codec, mode][-1]:,.0f}/s",
                    err=True,
                )
    click.echo("| records | how | images/s | x limit |\n| --- | --- | --- | --- |")
    for (codec, mode), found in rates.items():
        # Within a round, which reads the same records.
        of_limit = [rate / limit for rate, limit in zip(found, rates[codec, Mode.DISK], strict=True)]
        spread = f"{statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
        click.echo(f"| {codec} | {TITLES[mode]} | {spread} | {statistics.median(of_limit):.2f} |")


def _measure(mode: Mode, data: Path, workers: int, first: int) -> float:
    """Return images per second of ``workers`` processes together, each with its own part of the epoch."""
    forget(data / "data.mdb")  # the processes of the last turn have ended, so nothing maps it
    command = [sys.executable, "-m", "tools.bench.studies.cold", "--turn", mode, str(data)]
    running = [
        subprocess.Popen([*command, str(first), str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for index in range(workers)
    ]
    try:
        for process in running:  # wait until all have started, then begin together
            assert process.stdout is not None
            process.stdout.readline()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        seconds = [float(process.communicate()[0]) for process in running]
    finally:
        for process in running:
            process.kill()  # no effect on one that has answered
            process.wait()
    return workers * SLICES * BATCH / max(seconds)  # until the slowest has ended


def take_turn(mode: Mode, data: Path, seed: int, index: int) -> None:
    """Run one process's part once a line arrives on standard input; print the seconds that it took."""
    with Records(data) as records:
        view = complete_view(View(), records.statistics)
        # Consecutive positions; the epoch's order is shuffled, so each process reads all over the file, and no record
        # twice.
        what = [SliceId(view, seed, 0, (index * SLICES + n) * BATCH, BATCH) for n in range(SLICES)]
        # Made before `ready`, so that only reading is timed.
        work = _disk(records, data, what) if mode is Mode.DISK else _node(records, what, mode)
        click.echo("ready")
        sys.stdin.readline()
        start = time.perf_counter()
        work()
        click.echo(time.perf_counter() - start)


def _node(records: Records, what: list[SliceId], mode: Mode) -> Callable[[], None]:
    if mode is Mode.TOUCHING:
        records.ahead = NoReadAhead(records)  # type: ignore[assignment]
    out = empty_slice(SampleLayout(what[0].view, "uint8"), BATCH)  # one slot, written again and again

    def work() -> None:
        for each in what:
            fill(out, records, each)

    return work


def _disk(records: Records, data: Path, what: list[SliceId]) -> Callable[[], None]:
    numbers = [number for each in what for number in slice_numbers(len(records), each).tolist()]
    # Finding a record reads the pages of LMDB's tree, not the record's own: those are still on the disk.
    places = [place for number in numbers if (place := records.ahead.place(number))]
    forget_again = data / "data.mdb"

    def work() -> None:
        file = os.open(forget_again, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead by the kernel for this descriptor
        with ThreadPoolExecutor(THREADS) as pool:
            # pread() releases the GIL and has no shared file position, so the disk gets 16 requests at a time.
            for _ in pool.map(lambda place: os.pread(file, place[1], place[0]), places):
                pass
        os.close(file)

    return work


if __name__ == "__main__":
    main()
