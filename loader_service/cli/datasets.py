"""``loader-service preprocess``, ``verify``, ``inspect`` and ``export``: make datasets of pictures, and look into them."""

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
from loader_service.types import MAX_SIDE_PX, MIN_SIDE_PX, RECORD_SIDE_PX


class DatasetCommand(Job, Command):
    """A command that works on a dataset until it is done."""


class _Source(click.Path):
    """A path that is there, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Url(value) if URL.fullmatch(str(value)) else super().convert(value, param, ctx)


_SOURCE = _Source(path_type=Path, exists=True)


@click.command(cls=DatasetCommand)
@argument("src", type=_SOURCE)
@argument("out", type=click.Path(path_type=Path, file_okay=False))
@option(
    "--layout",
    type=click.Choice(["auto", *LAYOUTS, "table"]),
    default="auto",
    help="How SRC is laid out; found out where it can be.",
)
@option("--val", type=_SOURCE, help="Source of the validation split.")
@option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of each class to take for validation; 0 for none. "
    f"[default: {VALIDATION_SHARE}, where SRC holds no validation split]",
)
@option(
    "--val-list",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File that names the pictures to take for validation, as CLASS/name.jpg, one a line; the rest is for training.",
)
@option("--classes", default="", help="Take only these classes; names with commas between them.")
@option(
    "--codec",
    type=click.Choice(["raw", "jpeg", "centered", "auto"]),
    default="auto",
    help="Of the records; centered has the mean image subtracted, exactly, in 16 bits. "
    "auto takes raw if all of them fit into half of the memory.",
)
@option(
    "--quality",
    type=click.IntRange(1, 100),
    default=DEFAULT_PARAMETERS["jpeg"]["quality"],
    help="Of jpeg records.",
)
@option(
    "--size",
    type=click.IntRange(MIN_SIDE_PX, MAX_SIDE_PX),
    default=RECORD_SIDE_PX,
    help="How wide and high records are, in pixels; crops are 7/8 of it unless a loader is told otherwise.",
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
    help="Of the order and of --val-fraction.",
)
@option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.1,
    help="Share of bad files at which to give up.",
)
@option(
    "--file-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    help="Seconds that one file may take.",
)
@option("--dry-run", is_flag=True, help="Only say what would be done.")
@option("--json", is_flag=True, help="A summary on stdout, as JSON.")
@option("--replace", is_flag=True, help="Replace a dataset in OUT that was made from something else.")
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
    """Make OUT/train.lmdb and OUT/val.lmdb of the pictures in SRC.

    SRC is a folder or a tar archive of CLASS/name.jpg, or of such folders below train/ and val/ (or valid/, validation/,
    test/); ImageNet's archives in a folder, as distributed or from Kaggle; WebDataset shards; CIFAR-10's binary batches; or
    a table (.csv, .tsv, .jsonl) of path and label. Folders and archives may also lie behind a URL (s3://, gs://, https://).
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
    """Check every record of the environment at PATH, and what its manifest says; print its fingerprint."""
    click.echo(verifying.verify(path))


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
@option(
    "--pictures",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Write {', '.join(inspecting.PICTURES)} here.",
)
@option("--json", is_flag=True, help="Print the summary as JSON.")
def inspect(path: Path, pictures: Path | None, json: bool) -> None:
    """Show what is in the environment at PATH."""
    summary = inspecting.summarise(path)
    written = inspecting.write_pictures(path, pictures) if pictures else []
    click.echo(msgspec.json.encode(summary) if json else "\n".join(inspecting.describe(summary)))
    for picture in written:
        click.echo(picture, err=True)


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
@argument("out", type=click.Path(path_type=Path))
@option(
    "--format",
    type=click.Choice([form.value for form in exporting.ExportFormat]),
    default=exporting.ExportFormat.FOLDER.value,
    help="An image folder, or WebDataset shards.",
)
def export(path: Path, out: Path, format: str) -> None:  # noqa: A002
    """Write every record of the environment at PATH into OUT, as files CLASS/NUMBER or as shards of samples."""
    click.echo(f"{out}: {exporting.export(path, out, exporting.ExportFormat(format)):,} records")
