"""``loader-service verify``, ``inspect`` and ``export``: look into a dataset on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from loader_service.cli.options import argument, option
from loader_service.cli.preprocess import DatasetCommand
from loader_service.datasets import export as exporting
from loader_service.datasets import inspect as inspecting
from loader_service.datasets import verify as verifying


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
    for line in inspecting.inspect(path, pictures, as_json=json):
        click.echo(line)
    for name in inspecting.PICTURES if pictures else ():
        click.echo(f"{pictures}/{name}", err=True)


@click.command(cls=DatasetCommand)
@argument("path", type=click.Path(path_type=Path))
@argument("out", type=click.Path(path_type=Path))
@option(
    "--format",
    type=click.Choice(["folder", "webdataset"]),
    default="folder",
    help="An image folder, or WebDataset shards.",
)
def export(path: Path, out: Path, format: Literal["folder", "webdataset"]) -> None:  # noqa: A002
    """Write every record of the environment at PATH into OUT, as files CLASS/NUMBER or as shards of samples."""
    click.echo(f"{out}: {exporting.export(path, out, format):,} records")
