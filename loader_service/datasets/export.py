"""Export of an environment to files: an image folder or WebDataset shards.

A jpeg record becomes its own JPEG, byte for byte. A raw or centered record becomes a PNG with the same pixels. So raw
records that are exported and preprocessed again keep their pixels. OUT appears when it is complete.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from loader_service.data.codecs import CODECS
from loader_service.data.records import Records
from loader_service.datasets.progress import Progress
from loader_service.errors import OptionError, RecordError

SHARD_RECORDS: Final = 1000
"""Records per WebDataset shard: 20 MB to 150 MB, a good size for streaming."""


class ExportFormat(Enum):
    """The formats of an export; the values are those of ``--format``."""

    FOLDER = "folder"
    WEBDATASET = "webdataset"


Put = Callable[[int, str, str, bytes], None]
"""A function that stores one record: number, class name, file suffix, file bytes."""


def export(path: Path, out: Path, form: ExportFormat) -> int:
    """Write every record of the environment at ``path`` into a new folder, which appears when it is complete.

    Returns:
        Number of records written.

    Raises:
        OptionError: ``out`` exists already.
        RecordError: a record is damaged.
    """
    if out.exists():
        raise OptionError("OUT", str(out), "a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        with Records(path) as records:
            write_records(records, partial, form)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after success it was renamed, so there is nothing to remove
    return len(records)


def write_records(records: Records, out: Path, form: ExportFormat) -> None:
    """Write every record's file into a new folder.

    Raises:
        RecordError: a record is damaged.
    """
    out.mkdir()
    names = folder_names(records.manifest.class_names)
    storing = (
        folder(out) if form is ExportFormat.FOLDER else shards(out, {name: label for label, name in enumerate(names)})
    )
    # One read transaction for all: the environment never changes, so it holds back no pages from a writer.
    with storing as put, Progress("export", len(records), "records") as progress, records.values() as values:
        for number in range(len(records)):
            label, codec, _, payload = values.read(number)
            if label >= len(names):  # the payload's checksum does not cover the label
                raise RecordError(records.path, number, f"its label {label} is beyond the last class")
            if codec == CODECS["jpeg"]:
                put(number, names[label], "jpg", bytes(payload))
            else:
                png = BytesIO()
                # Level 1, the fastest: a PNG is lossless at every level.
                Image.fromarray(values.decode(number, payload, codec)).save(png, "PNG", compress_level=1)
                put(number, names[label], "png", png.getvalue())
            progress.advance()


def folder_names(class_names: tuple[str, ...]) -> list[str]:
    """Return a safe folder name for each class.

    A manifest's names are not trusted: characters that could lead out of the folder are replaced. Names that need no change
    keep their order, so that preprocessing the export gives the same labels.
    """
    # 200 bytes of UTF-8, since file systems count bytes; a character that the cut would split is dropped.
    short = [re.sub(r"[/\\\0]", "_", name).encode()[:200].decode(errors="ignore") for name in class_names]
    names = [name.strip() or "_" for name in short]
    # Preprocessing skips hidden folders.
    names = [f"_{name}" if name.startswith(".") else name for name in names]
    if len(set(names)) < len(names):  # replacing made two names equal: put the label first
        names = [f"{label:06d}_{name}" for label, name in enumerate(names)]
    return names


@contextmanager
def folder(out: Path) -> Iterator[Put]:
    """Yield a function that stores records as ``out/CLASS/NUMBER.SUFFIX``."""

    def put(number: int, name: str, suffix: str, content: bytes) -> None:
        path = out / name / f"{number:08d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    yield put


@contextmanager
def shards(out: Path, labels: dict[str, int]) -> Iterator[Put]:
    """Yield a function that stores records as NUMBER.SUFFIX and NUMBER.cls in shards ``out/000000.tar``, ``000001.tar``, ..."""
    shard: tarfile.TarFile | None = None

    def put(number: int, name: str, suffix: str, content: bytes) -> None:
        nonlocal shard
        if number % SHARD_RECORDS == 0:
            if shard is not None:
                shard.close()
            shard = tarfile.open(out / f"{number // SHARD_RECORDS:06d}.tar", "w")  # noqa: SIM115  # closed below
        assert shard is not None, "numbers begin at 0"
        # In WebDataset the files of a sample share their name up to the first dot.
        for ending, data in ((suffix, content), ("cls", b"%d" % labels[name])):
            member = tarfile.TarInfo(f"{number:08d}.{ending}")
            member.size = len(data)
            shard.addfile(member, BytesIO(data))

    try:
        yield put
    finally:
        if shard is not None:
            shard.close()
