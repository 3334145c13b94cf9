"""The command ``python -m tools.preprocess SRC OUT``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from loader_service import defaults
from loader_service.data.codecs import DEFAULT_PARAMETERS, Codec
from loader_service.data.manifest import Manifest
from loader_service.data.picture import LIBRARY, RECIPE
from loader_service.data.records import Records
from loader_service.data.writer import Writer, adopt
from loader_service.errors import OptionError
from loader_service.types import MAX_SIDE_PX, MIN_SIDE_PX, RECORD_SIDE_PX
from tools.command import CONTEXT, Command, ToolFailed
from tools.preprocess.build import Task, build, clear_unfinished, existing, locked, open_writer, report_rejected
from tools.preprocess.centring import centre_records, raw_twin, twin_path
from tools.preprocess.inputs import VALIDATION_SHARE, Inputs, list_splits, scratch_folder
from tools.preprocess.layouts import LAYOUTS
from tools.preprocess.plan import check_room, choose_codec, identity, room_bytes, shuffled
from tools.preprocess.pool import Pool
from tools.preprocess.remote import URL, Url
from tools.preprocess.sources import Listing


class _Source(click.Path):
    """A path that is there, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Url(value) if URL.fullmatch(str(value)) else super().convert(value, param, ctx)


_SOURCE = _Source(path_type=Path, exists=True)


class Options(msgspec.Struct, frozen=True):
    """What the command line asks for."""

    inputs: Inputs
    codec: Literal["raw", "jpeg", "centered", "auto"]
    quality: int
    size: int
    workers: int
    seed: int
    max_bad: float
    file_timeout: float
    replace: bool
    dry_run: bool
    as_json: bool


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("src", type=_SOURCE)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--layout",
    type=click.Choice(["auto", *LAYOUTS, "table"]),
    default="auto",
    show_default=True,
    help="How SRC is laid out; found out where it can be.",
)
@click.option("--val", type=_SOURCE, help="Source of the validation split.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of each class to take for validation; 0 for none. "
    f"[default: {VALIDATION_SHARE}, where SRC holds no validation split]",
)
@click.option(
    "--val-list",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File that names the pictures to take for validation, as CLASS/name.jpg, one a line; the rest is for training.",
)
@click.option("--classes", default="", help="Take only these classes; names with commas between them.")
@click.option(
    "--codec",
    type=click.Choice(["raw", "jpeg", "centered", "auto"]),
    default="auto",
    show_default=True,
    help="Of the records; centered has the mean image subtracted, exactly, in 16 bits. "
    "auto takes raw if all of them fit into half of the memory.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=DEFAULT_PARAMETERS["jpeg"]["quality"],
    show_default=True,
    help="Of jpeg records.",
)
@click.option(
    "--size",
    type=click.IntRange(MIN_SIDE_PX, MAX_SIDE_PX),
    default=RECORD_SIDE_PX,
    show_default=True,
    help="How wide and high records are, in pixels; crops are 7/8 of it unless a loader is told otherwise.",
)
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=defaults.WORKERS, show_default="one per CPU", help="Processes."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Of the order and of --val-fraction.",
)
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of bad files at which to give up.",
)
@click.option(
    "--file-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that one file may take.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="A summary on stdout, as JSON.")
@click.option("--replace", is_flag=True, help="Replace a dataset in OUT that was made from something else.")
def main(
    src: Path | Url,
    out: Path,
    layout: str,
    val: Path | Url | None,
    val_fraction: float | None,
    val_list: Path | None,
    classes: str,
    **options: Any,
) -> None:
    """Make OUT/train.lmdb and OUT/val.lmdb of the pictures in SRC.

    SRC is a folder or a tar archive of CLASS/name.jpg, or of such folders below train/ and val/ (or valid/, validation/,
    test/); ImageNet's archives in a folder, as distributed or from Kaggle; WebDataset shards; CIFAR-10's binary batches; or
    a table (.csv, .tsv, .jsonl) of path and label. Folders and archives may also lie behind a URL (s3://, gs://, https://).
    """
    names = tuple(name.strip() for name in classes.split(",") if name.strip())
    preprocess(out, Options(Inputs(src, layout, val, val_fraction, val_list, names), **options))


def preprocess(out: Path, options: Options) -> None:
    """Make both environments, unless they are there already."""
    source = options.inputs.source
    if isinstance(source, Path) and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise OptionError("OUT", str(out), f"a folder that is not inside of {source}, where the pictures are")
    with locked(out), scratch_folder(out) as scratch:
        train, val = list_splits(options.inputs, scratch, options.seed)
        listings = {"train": train} if val is None else {"train": train, "val": val}
        count = sum(len(listing.items) for listing in listings.values())
        codec = choose_codec(options.codec, count, options.size)
        click.echo(
            f"{len(train.items):,} files of {len(train.class_names):,} classes for training, "
            f"{count - len(train.items):,} for validation; {codec} records, about {room_bytes(count, codec, options.size) / 1e9:.2g} GB.",
            err=True,
        )
        if options.dry_run:
            return
        manifests: dict[str, Manifest] = {}
        for split, listing in listings.items():
            to_come = len(listing.items) + (len(val.items) if val and split == "train" else 0)
            task = plan(listing, out / f"{split}.lmdb", codec, options, manifests.get("train"))
            manifests[split] = make(task, options, to_come)
            shutil.rmtree(twin_path(task.path), ignore_errors=True)
        report_rejected(out, manifests)
    if options.as_json:
        click.echo(msgspec.json.encode({split: facts(manifest) for split, manifest in manifests.items()}))


def plan(listing: Listing, path: Path, codec: Codec, options: Options, train: Manifest | None) -> Task:
    """The task of one split; ``train`` is the manifest whose statistics it takes over."""
    parameters = dict(DEFAULT_PARAMETERS[codec])
    if codec == "jpeg":
        parameters["quality"] = options.quality
    made_by = {
        "input": identity(listing, codec, parameters, options.seed, options.size, train.fingerprint if train else ""),
        "library": LIBRARY,
        "recipe": RECIPE,
        "seed": str(options.seed),
        "statistics": f"of {train.fingerprint}" if train else "own",
    }
    return Task(
        path=path,
        items=shuffled(listing.items, options.seed),
        class_names=listing.class_names,
        codec=codec,
        parameters=parameters,
        size=options.size,
        made_by=made_by,
        statistics=train.statistics if train else None,
        max_bad=options.max_bad,
    )


def make(task: Task, options: Options, to_come: int) -> Manifest:
    """Make one environment unless it is there; room is looked for on disk for ``to_come`` records."""
    path, found = task.path, existing(task.path)
    if found is not None and found.made_by.get("input") == task.made_by["input"]:
        click.echo(
            f"{path}: {found.count:,} records are there already, fingerprint {found.fingerprint}", err=options.as_json
        )
        return found
    if path.exists() and not options.replace:
        raise ToolFailed(f"{path} is there and was made from something else: name another folder, or say --replace.")
    clear_unfinished(task, options.replace)
    manifest = adopt(path, task.made_by["input"]) or run(task, options, to_come)
    bad = f", {len(manifest.rejected):,} files rejected" if manifest.rejected else ""
    click.echo(
        f"{path}: {manifest.count:,} {task.codec} records{bad}, fingerprint {manifest.fingerprint}", err=options.as_json
    )
    return manifest


def run(task: Task, options: Options, to_come: int) -> Manifest:
    """Make what is not made yet of one environment."""
    if task.codec == "centered":
        return run_centred(task, options, to_come)
    with open_writer(task) as writer, telling_what_is_kept(writer):
        check_room(task.path.parent, to_come - len(writer), task.codec, task.size)
        workers = min(options.workers, len(task.items))
        with Pool(workers, task.codec, task.parameters, options.file_timeout, task.size) as pool:
            return build(task, writer, pool)


def run_centred(task: Task, options: Options, to_come: int) -> Manifest:
    """The same for ``centered`` records: raw ones first."""
    twin = raw_twin(task)
    if not twin.path.exists():
        check_room(task.path.parent, to_come, task.codec, task.size)
    make(twin, options, 0)
    with Records(twin.path) as raw, open_writer(task) as writer, telling_what_is_kept(writer):
        return centre_records(task, writer, raw)


@contextmanager
def telling_what_is_kept(writer: Writer) -> Iterator[None]:
    """Where the block fails or is stopped, say that the same command goes on, if it does."""
    try:
        yield
    except BaseException:
        if writer.kept:
            click.echo(f"{writer.path}: what is done is kept, and the same command goes on from there.", err=True)
        raise


def facts(manifest: Manifest) -> dict[str, object]:
    """What --json says of an environment."""
    return {
        "records": manifest.count,
        "classes": len(manifest.class_names),
        "codec": manifest.codec,
        "rejected": len(manifest.rejected),
        "fingerprint": manifest.fingerprint,
    }


if __name__ == "__main__":
    main(prog_name="python -m tools.preprocess")
