"""``loader-service preprocess``, ``verify``, ``inspect`` and ``export``: make a dataset from images, and examine it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from loader_service import defaults
from loader_service.cli.job import Job
from loader_service.cli.options import Command, argument, option
from loader_service.data.codecs import DEFAULT_PARAMETERS
from loader_service.datasets import export as exporting
from loader_service.datasets import inspect as inspecting
from loader_service.datasets import verify as verifying
from loader_service.datasets.preprocessing import run
from loader_service.datasets.preprocessing.inputs import VALIDATION_SHARE, Inputs
from loader_service.datasets.preprocessing.layouts import LAYOUTS
from loader_service.datasets.preprocessing.remote import URL, Url
from loader_service.errors import printable
from loader_service.types import MAX_SIDE_PX, MIN_SIDE_PX, RECORD_SIDE_PX


class DatasetCommand(Job, Command):
    """A command that processes a dataset: a Job whose options can be set in the configuration file."""


class _Source(click.Path):
    """The type of an argument that is an existing path or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # click.Path would look for a file of this name.
        return Url(value) if URL.fullmatch(str(value)) else super().convert(value, param, ctx)


_SOURCE = _Source(path_type=Path, exists=True)


@click.command(cls=DatasetCommand)
@argument("src", type=_SOURCE)
@argument("out", type=click.Path(path_type=Path, file_okay=False))
@option(
    "--layout",
    type=click.Choice(["auto", *LAYOUTS, "table"]),
    default="auto",
    help="Layout of SRC; auto detects it.",
)
@option("--val", type=_SOURCE, help="Source of the validation split.")
@option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Fraction of each class to use for validation; 0 for none. "
    f"[default: {VALIDATION_SHARE}, if SRC has no validation split]",
)
@option(
    "--val-list",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File that lists the images of the validation split, one CLASS/name.jpg per line; the rest is for training.",
)
@option("--classes", default="", help="Use only these classes: names, separated by commas.")
@option(
    "--codec",
    type=click.Choice(["raw", "jpeg", "centered", "auto"]),
    default="auto",
    help="Codec of the records: raw pixels, jpeg, or centered (mean image subtracted, lossless, 16 bits). "
    "auto selects raw if all records fit into half of the memory, else jpeg.",
)
@option(
    "--quality",
    type=click.IntRange(1, 100),
    default=DEFAULT_PARAMETERS["jpeg"]["quality"],
    help="Quality of jpeg records.",
)
@option(
    "--size",
    type=click.IntRange(MIN_SIDE_PX, MAX_SIDE_PX),
    default=RECORD_SIDE_PX,
    help="Width and height of the records in pixels; crops are 7/8 of it by default.",
)
@option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=defaults.WORKERS,
    show_default="one per CPU",
    help="Worker processes.",
)
@option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    help="Seed of the order of records and of --val-fraction.",
)
@option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.1,
    help="Stop if more than this fraction of the files is bad.",
)
@option(
    "--file-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    help="Seconds after which a file that is still being decoded counts as bad.",
)
@option("--dry-run", is_flag=True, help="Show what would be done, and stop.")
@option("--json", is_flag=True, help="Print a summary as JSON.")
@option("--replace", is_flag=True, help="Replace a dataset in OUT that was made from other input or options.")
def preprocess(
    src: Path | Url,
    out: Path,
    layout: str,
    val: Path | Url | None,
    val_fraction: float | None,
    val_list: Path | None,
    classes: str,
    json: bool,
    **options: Any,
) -> None:
    """Convert the images in SRC to OUT/train.lmdb and OUT/val.lmdb.

    SRC is a folder or tar archive with CLASS/name.jpg, or with train/ and val/ (or valid/, validation/, test/) that contain
    such folders; a folder with ImageNet's archives, as distributed or from Kaggle; WebDataset shards; CIFAR-10's binary
    batches; or a table (.csv, .tsv, .jsonl) of path and label. Folders and archives can also be URLs (s3://, gs://,
    https://). An interrupted run resumes if the same command runs again.
    """
    names = tuple(name.strip() for name in classes.split(",") if name.strip())
    inputs = Inputs(src, layout, val, val_fraction, val_list, names)
    # With --json, stdout holds the JSON alone.
    manifests = run.preprocess(out, run.Options(inputs, **options), partial(click.echo, err=json))
    if json and manifests:
        click.echo(msgspec.json.encode({split: run.split_facts(manifest) for split, manifest in manifests.items()}))


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Check all records of the dataset at PATH.

    Checks every record, the counts, the statistics and the golden samples against the manifest. Prints the fingerprint; the
    exit code is 0 only if the dataset is sound.
    """
    click.echo(verifying.verify(path))


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
@option(
    "--pictures",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Write {', '.join(inspecting.PICTURES)} to this directory.",
)
@option("--json", is_flag=True, help="Print the summary as JSON.")
def inspect(path: Path, pictures: Path | None, json: bool) -> None:
    """Show a summary of the dataset at PATH.

    Prints the counts, classes, colour statistics and rejected files.
    """
    summary = inspecting.summarise(path)
    written = inspecting.write_pictures(path, pictures) if pictures else []
    click.echo(msgspec.json.encode(summary) if json else "\n".join(map(printable, inspecting.describe(summary))))
    for picture in written:
        click.echo(picture, err=True)


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
@argument("out", type=click.Path(path_type=Path))
@option(
    "--format",
    type=click.Choice([form.value for form in exporting.ExportFormat]),
    default=exporting.ExportFormat.FOLDER.value,
    help="Format of the export: an image folder (CLASS/NUMBER.png or .jpg), or WebDataset shards.",
)
def export(path: Path, out: Path, format: str) -> None:  # noqa: A002
    """Write all records of the dataset at PATH as files to OUT."""
    click.echo(f"{out}: {exporting.export(path, out, exporting.ExportFormat(format)):,} records")
