"""Conversion of raw records to the codec ``centered``: the mean image is known only when all raw records are written."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from loader_service.data.codecs import centre_of, encode_centred
from loader_service.data.manifest import Manifest
from loader_service.data.records import Records
from loader_service.data.writer import Writer
from loader_service.datasets.preprocessing.build import COMMIT_BYTES, COMMIT_S, SplitTask
from loader_service.datasets.progress import Progress


def raw_task(task: SplitTask) -> SplitTask:
    """Return the task that makes the raw records for a ``centered`` task, in a hidden environment next to its own."""
    return msgspec.structs.replace(task, path=raw_path(task.path), codec="raw", parameters={})


def raw_path(path: Path) -> Path:
    """Return the path of the temporary raw records of the environment at ``path``."""
    return path.with_name(f".{path.stem}.raw.lmdb")


def centre_records(task: SplitTask, writer: Writer, raw: Records) -> Manifest:
    """Convert the raw records that are not converted yet, and return the manifest.

    Args:
        task: task of the ``centered`` environment.
        writer: its writer.
        raw: the environment of :func:`raw_task`; its statistics hold for both, because no pixel changes.
    """
    centre = centre_of(raw.statistics.mean_image)
    committed_s = time.monotonic()
    with Progress(f"{task.path.stem}, centred", len(raw), "records", done=len(writer)) as progress:
        # Records have the same numbers in both environments, so the count written is where to resume.
        for number in range(len(writer), len(raw)):
            label, pixels = raw.pixels(number)
            writer.put(label, encode_centred(pixels, centre), raw.source(number))
            progress.advance()
            if writer.uncommitted_bytes >= COMMIT_BYTES or time.monotonic() - committed_s >= COMMIT_S:
                writer.commit()  # no state: the statistics are those of the raw records
                committed_s = time.monotonic()
        # The raw run's rejections come last, in one step with the manifest; after an interruption, only the rest of them.
        for bad in raw.manifest.rejected[len(writer.rejected) :]:
            writer.reject(bad.source, bad.reason)
        return writer.finish(raw.statistics, made_by=task.made_by)
