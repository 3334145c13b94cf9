"""One split: its items through the pool into an environment."""

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
"""So many bad files are named while they come; the manifest names all."""

LEAST_BAD: Final = 100
"""A run is not called hopeless before it has met so many bad files."""

COMMIT_BYTES: Final = 2**24
"""So many bytes of records are lost at most by an interruption; the 1.5 MiB of sums beside them hardly count."""

COMMIT_S: Final = 5.0
"""Where files come slowly, so many seconds of work are lost at most."""

REJECTED: Final = "rejected.jsonl"
"""Beside the environments: split, source and reason of every file that became no record."""


class SplitTask(msgspec.Struct, frozen=True):
    """What is to become one environment.

    Fields:
        path: its final name.
        items: in the order of the records.
        class_names: by label.
        codec, parameters: of the payloads.
        size: the records' side in pixels.
        made_by: goes into the manifest.
        statistics: the training split's, for a validation split; None takes this split's own.
        max_bad: the run is hopeless when more than this share of the items is bad.
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
    """The task's writer, which goes on where an interrupted run of the same task was."""
    return Writer(
        task.path,
        codec=task.codec,
        class_names=task.class_names,
        codec_parameters=task.parameters,
        identity=task.made_by["input"],
    )


def build(task: SplitTask, writer: Writer, pool: Pool) -> Manifest:
    """Make an environment, or the rest of it, and return its manifest.

    A commit holds whole chunks of the pool, with the sums of their pixels. As every item before it has become either a
    record or a rejection, how many there are of both says where to go on.

    Raises:
        DatasetInvalid: it cannot be written, or nothing could be made a record.
        PreprocessingFailed: too many files are bad, or workers cannot start.
    """
    most_bad = max(LEAST_BAD, int(task.max_bad * len(task.items)))
    sums = Sums.from_bytes(writer.state, task.size) if writer.state else Sums(task.size)
    done = len(writer) + len(writer.rejected)
    committed_s = time.monotonic()
    with Progress(task.path.stem, len(task.items), "files", done=done, bad=len(writer.rejected)) as progress:
        if done:
            progress.say(f"{task.path.stem}: going on after {done:,} files that an interrupted run has done")
        for result in pool.run(task.items[done:]):
            _take(writer, result, progress)
            sums.add(result.count, result.image, result.products)
            if len(writer.rejected) > most_bad:
                last = writer.rejected[-1]
                raise PreprocessingFailed(
                    f"{len(writer.rejected)} files are bad, the last one {last.source} ({last.reason}): "
                    "is this the right folder? --max-bad sets what share of bad files is taken."
                )
            if writer.uncommitted_bytes >= COMMIT_BYTES or time.monotonic() - committed_s >= COMMIT_S:
                writer.commit(sums.to_bytes())
                committed_s = time.monotonic()
        if not len(writer):
            first = writer.rejected[0]
            raise DatasetInvalid(
                task.path,
                f"none of {len(task.items)} files became a record; the first, {first.source}, because {first.reason}",
            )
        writer.commit(sums.to_bytes())
        return writer.finish(task.statistics or sums.statistics(), made_by=task.made_by)


def _take(writer: Writer, result: Result, progress: Progress) -> None:
    """Store the records of one chunk, and note what has none."""
    bad = 0
    for item, record in zip(result.items, result.records, strict=True):
        if not isinstance(record, str):
            writer.put_record(record, item.source)
            continue
        bad += 1
        writer.reject(item.source, record)
        if len(writer.rejected) <= SHOWN_REJECTED:
            progress.say(f"rejected {item.source}: {record}")
    progress.advance(len(result.items), bad=bad)


def clear_unfinished(task: SplitTask, replace: bool) -> None:
    """Remove unfinished environments of other tasks under the same name.

    Args:
        task: what is to be made; what an interrupted run has done of it stays.
        replace: whether records of other tasks may be lost.

    Raises:
        PreprocessingFailed: they may not, and there are some.
    """
    own = partial_path(task.path, task.made_by["input"])
    for partial, count in partials(task.path).items():
        if partial == own:
            continue
        if count and not replace:
            raise PreprocessingFailed(
                f"{partial} holds {count:,} records of an interrupted run with another source or other options: "
                "run that command again to go on with it, name another folder, or say --replace to drop it."
            )
        shutil.rmtree(partial)


def existing(path: Path) -> Manifest | None:
    """The manifest of the environment at ``path``, if there is a whole one."""
    try:
        with Records(path) as records:
            return records.manifest
    except DatasetError:
        return None


def report_rejected(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """Write REJECTED anew, or remove it where nothing was rejected.

    Args:
        out: the folder of the environments.
        manifests: by split.
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
    partial.rename(out / REJECTED)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold ``out`` for this run alone, and clear away what a killed run has left in it and cannot go on from.

    Raises:
        PreprocessingFailed: another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreprocessingFailed(
                f"another run is writing to {out}: wait for it, or name another folder."
            ) from None
        _clear(out)
        yield
    finally:
        os.close(descriptor)


def _clear(out: Path) -> None:
    """Remove what a killed run has left of no use, and put a dataset back that it had only moved aside."""
    for split in ("train", "val"):
        for partial, count in partials(out / f"{split}.lmdb").items():
            if not count:
                shutil.rmtree(partial)
    for path in list(out.iterdir()):
        if moved := re.fullmatch(r"\.((train|val)\.lmdb)\.[0-9a-f]{8}\.old", path.name):
            if (final := out / moved[1]).exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        elif re.fullmatch(r"\..+\.[0-9a-f]{8}\.(unpacked|jsonl)", path.name):
            path.unlink()
