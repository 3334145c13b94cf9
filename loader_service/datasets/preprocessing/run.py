"""Make both environments of a dataset, unless they are there already."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click
import msgspec

from loader_service.data.codecs import DEFAULT_PARAMETERS, Codec
from loader_service.data.manifest import Manifest
from loader_service.data.picture import LIBRARY, RECIPE
from loader_service.data.records import Records
from loader_service.data.writer import Writer, adopt
from loader_service.datasets.preprocessing.build import (
    Task,
    build,
    clear_unfinished,
    existing,
    locked,
    open_writer,
    report_rejected,
)
from loader_service.datasets.preprocessing.centring import centre_records, raw_twin, twin_path
from loader_service.datasets.preprocessing.inputs import Inputs, list_splits, scratch_folder
from loader_service.datasets.preprocessing.plan import check_room, choose_codec, identity, room_bytes, shuffled
from loader_service.datasets.preprocessing.pool import Pool
from loader_service.datasets.preprocessing.sources import Listing
from loader_service.errors import OptionError, PreprocessingFailed


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
    json: bool


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
    if options.json:
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
            f"{path}: {found.count:,} records are there already, fingerprint {found.fingerprint}", err=options.json
        )
        return found
    if path.exists() and not options.replace:
        raise PreprocessingFailed(
            f"{path} is there and was made from something else: name another folder, or say --replace."
        )
    clear_unfinished(task, options.replace)
    manifest = adopt(path, task.made_by["input"]) or run(task, options, to_come)
    bad = f", {len(manifest.rejected):,} files rejected" if manifest.rejected else ""
    click.echo(
        f"{path}: {manifest.count:,} {task.codec} records{bad}, fingerprint {manifest.fingerprint}", err=options.json
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
