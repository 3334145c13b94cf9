"""Building one split: its items go through the worker pool into an environment."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from loader_service.data.codecs import Codec
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.records import Records
from loader_service.data.writer import Writer, partial_path, partials
from loader_service.datasets.preprocessing.pool import Pool, Result
from loader_service.datasets.preprocessing.sources import Item
from loader_service.datasets.progress import Progress
from loader_service.datasets.statistics import Sums
from loader_service.errors import DatasetError, DatasetInvalid, PreprocessingFailed

SHOWN_REJECTED: Final = 10
"""Number of bad files that are named during the run; the manifest lists all."""

LEAST_BAD: Final = 100
"""Number of bad files that never stop a run, whatever --max-bad is: a small dataset may have a few."""

COMMIT_BYTES: Final = 2**24
"""Bytes of records between commits: an interruption loses at most these. The sums in each commit add only 1.5 MiB."""

COMMIT_S: Final = 5.0
"""Seconds between commits if records come slowly: an interruption loses at most this much work."""

REJECTED: Final = "rejected.jsonl"
"""File next to the environments with split, source and reason of every rejected file."""


class SplitTask(msgspec.Struct, frozen=True):
    """The task to make one environment.

    Fields:
        path: final name of the environment.
        items: the items, in the order of the records.
        class_names: class names by label.
        codec: codec of the records.
        parameters: parameters of the codec.
        size: side of the records, in pixels.
        made_by: origin of the records, for the manifest; "input" is the identity of the task.
        statistics: statistics of the training split, for a validation split; None computes this split's own.
        max_bad: fraction of bad items above which the run stops.
    """

    path: Path
    items: Sequence[Item]
    class_names: tuple[str, ...]
    codec: Codec
    parameters: dict[str, int | str]
    size: int
    made_by: dict[str, str]
    statistics: Statistics | None
    max_bad: float


def open_writer(task: SplitTask) -> Writer:
    """Return the task's writer; it resumes an interrupted run of the same task."""
    return Writer(
        task.path,
        codec=task.codec,
        class_names=task.class_names,
        codec_parameters=task.parameters,
        identity=task.made_by["input"],
    )


def build(task: SplitTask, writer: Writer, pool: Pool) -> Manifest:
    """Make an environment, or the rest of it, and return its manifest.

    A commit holds whole chunks of the pool, with the sums of their pixels. Every item before it has become either a record
    or a rejection, so the number of both is the index of the next item.

    Raises:
        DatasetInvalid: LMDB cannot write, or no item became a record.
        PreprocessingFailed: too many files are bad, or workers cannot start.
    """
    most_bad = max(LEAST_BAD, int(task.max_bad * len(task.items)))
    # The state of the last commit: the sums of exactly the records that the writer has.
    sums = Sums.from_bytes(writer.state, task.size) if writer.state else Sums(task.size)
    done = len(writer) + len(writer.rejected)
    committed_s = time.monotonic()
    with Progress(task.path.stem, len(task.items), "files", done=done, bad=len(writer.rejected)) as progress:
        if done:
            progress.say(f"{task.path.stem}: resuming after {done:,} files of an interrupted run")
        for result in pool.run(task.items[done:]):
            _take(writer, result, progress)
            sums.add(result.count, result.image, result.products)  # before the next result overwrites the area
            if len(writer.rejected) > most_bad:
                last = writer.rejected[-1]
                raise PreprocessingFailed(
                    f"{len(writer.rejected)} files are bad, the last one {last.source} ({last.reason}): "
                    "is this the right folder? --max-bad sets the fraction of bad files that is accepted."
                )
            # Only here, between chunks: a commit's sums are those of exactly its records.
            if writer.uncommitted_bytes >= COMMIT_BYTES or time.monotonic() - committed_s >= COMMIT_S:
                writer.commit(sums.to_bytes())
                committed_s = time.monotonic()
        if not len(writer):
            first = writer.rejected[0]
            raise DatasetInvalid(
                task.path,
                f"none of {len(task.items)} files became a record; the first is {first.source}: {first.reason}",
            )
        # finish() stores the state of the last commit again, so the final sums go in first.
        writer.commit(sums.to_bytes())
        return writer.finish(task.statistics or sums.statistics(), made_by=task.made_by)


def _take(writer: Writer, result: Result, progress: Progress) -> None:
    """Store the records of one chunk, and note its rejected items."""
    bad = 0
    for item, record in zip(result.items, result.records, strict=True):
        if not isinstance(record, str):
            writer.put_record(record, item.source)  # LMDB copies it into a page
            continue
        bad += 1
        writer.reject(item.source, record)
        if len(writer.rejected) <= SHOWN_REJECTED:
            progress.say(f"rejected {item.source}: {record}")
    progress.advance(len(result.items), bad=bad)


def clear_unfinished(task: SplitTask, replace: bool) -> None:
    """Remove unfinished environments of other tasks under the same name.

    Args:
        task: the task to run; its own unfinished environment stays.
        replace: True if records of other tasks may be removed.

    Raises:
        PreprocessingFailed: another task's environment holds records, and ``replace`` is False.
    """
    # The identity is part of the hidden name, so another task's remains have another name.
    own = partial_path(task.path, task.made_by["input"])
    for partial, count in partials(task.path).items():
        if partial == own:
            continue
        if count and not replace:
            raise PreprocessingFailed(
                f"{partial} holds {count:,} records of an interrupted run with another source or other options: "
                "run that command again to resume it, name another folder, or use --replace to remove it."
            )
        shutil.rmtree(partial)


def existing(path: Path) -> Manifest | None:
    """Return the manifest of the environment at ``path``; None if there is no complete one."""
    try:
        with Records(path) as records:
            return records.manifest
    except DatasetError:
        return None


def report_rejected(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """Write the file REJECTED; remove an older one if nothing was rejected.

    Args:
        out: folder of the environments.
        manifests: manifests by split.
    """
    lines = [
        msgspec.json.encode({"split": split, "source": bad.source, "reason": bad.reason})
        for split, manifest in manifests.items()
        for bad in manifest.rejected
    ]
    if not lines:
        (out / REJECTED).unlink(missing_ok=True)
        return
    partial = out / f".rejected.{secrets.token_hex(4)}.jsonl"
    partial.write_bytes(b"\n".join([*lines, b""]))
    partial.rename(out / REJECTED)  # atomic: a reader sees the old file or the new one


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock ``out`` for this run, and remove what a killed run left in it and cannot resume.

    Raises:
        PreprocessingFailed: another run holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The lock is on the folder itself, so no lock file stays behind. O_CLOEXEC: a worker must not keep it locked.
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it if this process is killed
        except BlockingIOError:
            raise PreprocessingFailed(
                f"another run is writing to {out}: wait for it, or name another folder."
            ) from None
        _clear(out)  # under the lock: no other run owns these files
        yield
    finally:
        os.close(descriptor)  # also unlocks


def _clear(out: Path) -> None:
    """Remove useless remains of a killed run, and move back a dataset that it was about to replace."""
    for split in ("train", "val"):
        for partial, count in partials(out / f"{split}.lmdb").items():
            if not count:  # nothing was committed, so nothing can be resumed
                shutil.rmtree(partial)
    for path in list(out.iterdir()):  # a list, because the loop renames and removes entries
        if moved := re.fullmatch(r"\.((train|val)\.lmdb)\.[0-9a-f]{8}\.old", path.name):
            if (final := out / moved[1]).exists():  # killed after both renames of _publish()
                shutil.rmtree(path)
            else:
                path.rename(final)  # killed between them
        elif re.fullmatch(r"\..+\.[0-9a-f]{8}\.(unpacked|jsonl)", path.name):  # inputs._unpacked(), report_rejected()
            path.unlink()
