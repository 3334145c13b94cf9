"""A run of preprocessing: it makes both environments of a dataset, or the rest of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click
import msgspec

from loader_service.data.codecs import DEFAULT_PARAMETERS, Codec
from loader_service.data.image_file import LIBRARY, RECIPE
from loader_service.data.manifest import Manifest
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
from loader_service.datasets.preprocessing.centered_codec import centre_records, raw_path, raw_task
from loader_service.datasets.preprocessing.inputs import Inputs, list_splits, scratch_folder
from loader_service.datasets.preprocessing.plan import check_disk_space, choose_codec, disk_bytes, identity, shuffled
from loader_service.datasets.preprocessing.pool import Pool
from loader_service.datasets.preprocessing.sources import Listing
from loader_service.errors import OptionError, PreprocessingFailed

Report = Callable[[str], None]
"""A function that shows one line of text."""


class Options(msgspec.Struct, frozen=True):
    """The options of a run; see ``loader-service preprocess --help``."""

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
    """Make both environments in ``out``, unless they are up to date.

    Args:
        out: folder of the environments.
        options: sources and options.
        report: called with one line for each environment.

    Returns:
        Manifests by split; empty after a dry run.

    Raises:
        OptionError: the options contradict each other or the source.
        DatasetInvalid: a source cannot be read, or LMDB cannot write.
        PreprocessingFailed: ``out`` is in use or holds another dataset, the disk is too small, or too many files are bad.
    """
    source = options.inputs.source
    # A second run would otherwise find its own files among the images.
    if isinstance(source, Path) and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise OptionError("OUT", str(out), f"a folder that is not inside of {source}, where the images are")
    # The lock first: scratch_folder() removes all decompressed archives in `out`.
    with locked(out), scratch_folder(out) as scratch:
        train, val = list_splits(options.inputs, scratch, options.seed)
        listings = {"train": train} if val is None else {"train": train, "val": val}
        count = sum(len(listing.items) for listing in listings.values())
        codec = choose_codec(options.codec, count, options.size)  # one for both splits
        click.echo(
            f"{len(train.items):,} files of {len(train.class_names):,} classes for training, "
            f"{count - len(train.items):,} for validation; {codec} records, about {disk_bytes(count, codec, options.size) / 1e9:.2g} GB.",
            err=True,
        )
        if options.dry_run:
            return {}
        manifests: dict[str, Manifest] = {}
        for split, listing in listings.items():
            # The check of disk space before training also covers validation, so that a run does not fail half-way.
            to_come = len(listing.items) + (len(val.items) if val and split == "train" else 0)
            # train comes first: None for itself, its manifest for val
            task = plan_split(listing, out / f"{split}.lmdb", codec, options, manifests.get("train"))
            manifests[split] = make_split(task, options, to_come, report)
            shutil.rmtree(raw_path(task.path), ignore_errors=True)  # only after the centered environment is complete
        report_rejected(out, manifests)
    return manifests


def plan_split(listing: Listing, path: Path, codec: Codec, options: Options, train: Manifest | None) -> SplitTask:
    """Return the task of one split; ``train`` is the manifest whose statistics it uses, None for its own."""
    parameters = dict(DEFAULT_PARAMETERS[codec])  # a copy, because it is changed
    if codec == "jpeg":
        parameters["quality"] = options.quality
    made_by = {
        "input": identity(listing, codec, parameters, options.seed, options.size, train.fingerprint if train else ""),
        "library": LIBRARY,
        "recipe": RECIPE,
        "seed": str(options.seed),
        "statistics": f"of {train.fingerprint}" if train else "own",  # tells verify which statistics to expect
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
    """Make one environment unless it is up to date, and return its manifest.

    Args:
        task: the environment to make.
        options: options of the run.
        to_come: number of records still to be written in this run, for the check of the disk's free space.
        report: called with one line for the environment.
    """
    path, found = task.path, existing(task.path)
    if found is not None and found.made_by.get("input") == task.made_by["input"]:  # same files, options and libraries
        report(f"{path}: up to date, {found.count:,} records, fingerprint {found.fingerprint}")
        return found
    if path.exists() and not options.replace:
        raise PreprocessingFailed(
            f"{path} exists and was made from other input or options: name another folder, or use --replace."
        )
    clear_unfinished(task, options.replace)
    # A run that was killed after the last write left a complete environment under its hidden name.
    manifest = adopt(path, task.made_by["input"]) or write_split(task, options, to_come, report)
    bad = f", {len(manifest.rejected):,} files rejected" if manifest.rejected else ""
    report(f"{path}: {manifest.count:,} {task.codec} records{bad}, fingerprint {manifest.fingerprint}")
    return manifest


def write_split(task: SplitTask, options: Options, to_come: int, report: Report) -> Manifest:
    """Write the records of one environment that an interrupted run has not written."""
    if task.codec == "centered":
        return write_centered_split(task, options, to_come, report)
    with open_writer(task) as writer, reporting_kept_work(writer):
        check_disk_space(task.path.parent, to_come - len(writer), task.codec, task.size)  # some may be written already
        workers = min(options.workers, len(task.items))
        with Pool(workers, task.codec, task.parameters, options.file_timeout, task.size) as pool:
            return build(task, writer, pool)


def write_centered_split(task: SplitTask, options: Options, to_come: int, report: Report) -> Manifest:
    """Write one environment of ``centered`` records: first raw records, then their conversion."""
    first = raw_task(task)
    if not first.path.exists():  # once, before the raw records: the share of `centered` includes them
        check_disk_space(task.path.parent, to_come, task.codec, task.size)
    make_split(first, options, 0, report)  # 0: their disk space has been checked
    with Records(first.path) as raw, open_writer(task) as writer, reporting_kept_work(writer):
        return centre_records(task, writer, raw)


@contextmanager
def reporting_kept_work(writer: Writer) -> Iterator[None]:
    """Tell the user, if the block fails or is stopped, that the same command resumes the run."""
    try:
        yield
    except BaseException:  # KeyboardInterrupt and SIGTERM's SystemExit too
        if writer.kept:
            click.echo(f"{writer.path}: the finished part is kept; run the same command to resume.", err=True)
        raise


def split_facts(manifest: Manifest) -> dict[str, object]:
    """Return the facts of an environment for --json."""
    return {
        "records": manifest.count,
        "classes": len(manifest.class_names),
        "codec": manifest.codec,
        "rejected": len(manifest.rejected),
        "fingerprint": manifest.fingerprint,
    }
