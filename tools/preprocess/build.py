"""One split: its items through the pool into an environment."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from loader_service.data.records import Codec, Manifest, Records, Rejected, Statistics
from loader_service.data.writer import Writer
from loader_service.errors import DatasetError, DatasetInvalid
from tools.command import ToolFailed
from tools.preprocess.pool import Pool
from tools.preprocess.sources import Item
from tools.progress import Progress
from tools.statistics import Sums

SHOWN_REJECTED: Final = 10
"""So many bad files are named while they come; the manifest names all."""

LEAST_BAD: Final = 100
"""A run is not called hopeless before it has met so many bad files."""


REJECTED: Final = "rejected.jsonl"
"""Beside the environments: split, source and reason of every file that became no record."""


class Task(msgspec.Struct, frozen=True):
    """What is to become one environment.

    Fields:
        path: its final name.
        items: in the order of the records.
        class_names: by label.
        codec, parameters: of the payloads.
        made_by: goes into the manifest.
        statistics: the training split's, for a validation split; None takes this split's own.
        max_bad: the run is hopeless when more than this share of the items is bad.
    """

    path: Path
    items: Sequence[Item]
    class_names: tuple[str, ...]
    codec: Codec
    parameters: dict[str, int | str]
    made_by: dict[str, str]
    statistics: Statistics | None
    max_bad: float


def build(task: Task, pool: Pool) -> Manifest:
    """Make an environment and return its manifest.

    Raises:
        DatasetInvalid: it cannot be written, or nothing could be made a record.
        ToolFailed: too many files are bad, or workers cannot start.
    """
    most_bad = max(LEAST_BAD, int(task.max_bad * len(task.items)))
    sums, rejected = Sums(), list[Rejected]()
    writing = Writer(task.path, codec=task.codec, class_names=task.class_names, codec_parameters=task.parameters)
    with writing as writer, Progress(task.path.stem, len(task.items), "files") as progress:
        for result in pool.run(task.items):
            bad_before = len(rejected)
            for item, payload in zip(result.items, result.payloads, strict=True):
                if isinstance(payload, str):
                    rejected.append(Rejected(item.source, payload))
                    if len(rejected) <= SHOWN_REJECTED:
                        progress.say(f"rejected {item.source}: {payload}")
                else:
                    writer.put(item.label, payload, item.source)
            sums.add(result.count, result.image, result.products)
            progress.advance(len(result.items), bad=len(rejected) - bad_before)
            if len(rejected) > most_bad:
                raise ToolFailed(
                    f"{len(rejected)} files are bad, the last one {rejected[-1].source} ({rejected[-1].reason}): "
                    "is this the right folder? --max-bad sets what share of bad files is taken."
                )
        if not len(writer):
            raise DatasetInvalid(
                task.path,
                f"none of {len(task.items)} files became a record; the first, {rejected[0].source}, because {rejected[0].reason}",
            )
        return writer.finish(task.statistics or sums.statistics(), made_by=task.made_by, rejected=rejected)


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
    """Hold ``out`` for this run alone, and clear away what a killed run has left in it.

    Raises:
        ToolFailed: another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolFailed(f"another run is writing to {out}: wait for it, or name another folder.") from None
        _clear(out)
        yield
    finally:
        os.close(descriptor)


def _clear(out: Path) -> None:
    """Remove what a killed run has left, and put a dataset back that it had only moved aside."""
    for path in list(out.iterdir()):
        if moved := re.fullmatch(r"\.((train|val)\.lmdb)\.[0-9a-f]{8}\.old", path.name):
            if (final := out / moved[1]).exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        elif re.fullmatch(r"\.(train|val)\.lmdb\.[0-9a-f]{8}\.partial", path.name):
            shutil.rmtree(path)
        elif re.fullmatch(r"\..+\.[0-9a-f]{8}\.(unpacked|jsonl)", path.name):
            path.unlink()
