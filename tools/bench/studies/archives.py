"""``python -m tools.bench.studies.archives ARCHIVE...``: preprocessing archives, compared with decoding and resizing alone.

Prints a row of a Markdown table for each archive. The command's time includes everything: the start of Python, listing and
decompressing the archive, statistics, raw records of the training split, manifest and golden samples. The other figure is
the rate of as many processes that only decode and resize the same files, unpacked and in the page cache.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from loader_service.cli.job import CONTEXT, Job
from loader_service.data.records import Records
from loader_service.types import MAX_SIDE_PX, MIN_SIDE_PX, RECORD_SIDE_PX
from tools.bench.report.document import machine
from tools.bench.single import preprocess_s, standardising
from tools.terminal import ROOT

COLUMNS: Final = ("archive", "images", "size", "seconds", "images/s", "decode + resize alone", "ratio")


@click.command(cls=Job, context_settings=CONTEXT)
@click.argument("archives", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--size",
    type=click.IntRange(MIN_SIDE_PX, MAX_SIDE_PX),
    default=RECORD_SIDE_PX,
    show_default=True,
    help="Side of records in pixels.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count(), show_default="one per CPU", help="Processes."
)
def main(archives: tuple[Path, ...], size: int, workers: int) -> None:
    """Time `loader-service preprocess` on ARCHIVES; print a table."""
    click.echo(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {workers} workers.\n")
    click.echo(_row(COLUMNS))
    click.echo(_row(["---"] * len(COLUMNS)))
    for archive in archives:
        click.echo(_row(measure(archive, size, workers)))


def measure(archive: Path, size: int, workers: int) -> list[str]:
    """Return the cells of one archive's row."""
    # TemporaryDirectory does not make its parent.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loader-bench-", dir=ROOT / "build") as name:
        folder = Path(name)
        seconds = preprocess_s(archive, folder / "out", workers, size)
        with Records(folder / "out" / "train.lmdb") as records:
            count = len(records) + len(records.manifest.rejected)  # a rejected file was read too
        tree = folder / "tree"
        with tarfile.open(archive) as packed:
            packed.extractall(tree, filter="data")  # "data" refuses paths and links that lead out of `tree`
        alone = standardising(tree, workers, size)  # right after unpacking, so the files are in the page cache
    ratio = count / seconds / alone  # both in images/s
    return [
        archive.name,
        f"{count:,}",
        str(size),
        f"{seconds:.1f}",
        f"{count / seconds:,.0f}",
        f"{alone:,.0f}",
        f"{ratio:.2f}",
    ]


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(prog_name="python -m tools.bench.studies.archives")
