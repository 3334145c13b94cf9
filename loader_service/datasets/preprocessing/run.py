"""Make both environments of a dataset, unless they are there already."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
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
    SplitTask,
    build,
    clear_unfinished,
    existing,
    locked,
    open_writer,
    report_rejected,
)
from loader_service.datasets.preprocessing.centered import centre_records, raw_path, raw_task
from loader_service.datasets.preprocessing.inputs import Inputs, list_splits, scratch_folder
from loader_service.datasets.preprocessing.plan import check_disk_space, choose_codec, disk_bytes, identity, shuffled
from loader_service.datasets.preprocessing.pool import Pool
from loader_service.datasets.preprocessing.sources import Listing
from loader_service.errors import OptionError, PreprocessingFailed

Report = Callable[[str], None]


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


def preprocess(out: Path, options: Options, report: Report) -> dict[str, Manifest]:
    """Make both environments, unless they are there already.

    Args:
        out: their folder.
        options: what to make, and how.
        report: called with one line of text for each environment.

    Returns:
        Their manifests, by split; empty for a dry run.
    """
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
            f"{count - len(train.items):,} for validation; {codec} records, about {disk_bytes(count, codec, options.size) / 1e9:.2g} GB.",
            err=True,
        )
        if options.dry_run:
            return {}
        manifests: dict[str, Manifest] = {}
        for split, listing in listings.items():
            to_come = len(listing.items) + (len(val.items) if val and split == "train" else 0)
            task = plan_split(listing, out / f"{split}.lmdb", codec, options, manifests.get("train"))
            manifests[split] = make_split(task, options, to_come, report)
            shutil.rmtree(raw_path(task.path), ignore_errors=True)
        report_rejected(out, manifests)
    return manifests


def plan_split(listing: Listing, path: Path, codec: Codec, options: Options, train: Manifest | None) -> SplitTask:
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
    return SplitTask(
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


def make_split(task: SplitTask, options: Options, to_come: int, report: Report) -> Manifest:
    """Make one environment unless it is there; room is looked for on disk for ``to_come`` records."""
    path, found = task.path, existing(task.path)
    if found is not None and found.made_by.get("input") == task.made_by["input"]:
        report(f"{path}: {found.count:,} records are there already, fingerprint {found.fingerprint}")
        return found
    if path.exists() and not options.replace:
        raise PreprocessingFailed(
            f"{path} is there and was made from something else: name another folder, or say --replace."
        )
    clear_unfinished(task, options.replace)
    manifest = adopt(path, task.made_by["input"]) or write_split(task, options, to_come, report)
    bad = f", {len(manifest.rejected):,} files rejected" if manifest.rejected else ""
    report(f"{path}: {manifest.count:,} {task.codec} records{bad}, fingerprint {manifest.fingerprint}")
    return manifest


def write_split(task: SplitTask, options: Options, to_come: int, report: Report) -> Manifest:
    """Make what is not made yet of one environment."""
    if task.codec == "centered":
        return write_centered_split(task, options, to_come, report)
    with open_writer(task) as writer, reporting_kept_work(writer):
        check_disk_space(task.path.parent, to_come - len(writer), task.codec, task.size)
        workers = min(options.workers, len(task.items))
        with Pool(workers, task.codec, task.parameters, options.file_timeout, task.size) as pool:
            return build(task, writer, pool)


def write_centered_split(task: SplitTask, options: Options, to_come: int, report: Report) -> Manifest:
    """The same for ``centered`` records: raw ones first."""
    raw_records = raw_task(task)
    if not raw_records.path.exists():
        check_disk_space(task.path.parent, to_come, task.codec, task.size)
    make_split(raw_records, options, 0, report)
    with Records(raw_records.path) as raw, open_writer(task) as writer, reporting_kept_work(writer):
        return centre_records(task, writer, raw)


@contextmanager
def reporting_kept_work(writer: Writer) -> Iterator[None]:
    """Where the block fails or is stopped, say that the same command goes on, if it does."""
    try:
        yield
    except BaseException:
        if writer.kept:
            click.echo(f"{writer.path}: what is done is kept, and the same command goes on from there.", err=True)
        raise


def split_facts(manifest: Manifest) -> dict[str, object]:
    """What --json says of an environment."""
    return {
        "records": manifest.count,
        "classes": len(manifest.class_names),
        "codec": manifest.codec,
        "rejected": len(manifest.rejected),
        "fingerprint": manifest.fingerprint,
    }
