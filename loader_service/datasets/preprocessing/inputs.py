"""The input of a run: from the sources that the command line names to the listings of both splits."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final

import msgspec

from loader_service.datasets.preprocessing.layouts import FoundSplits, Pairs, find
from loader_service.datasets.preprocessing.plan import split_listed, split_off
from loader_service.datasets.preprocessing.remote import Url, list_remote, open_remote
from loader_service.datasets.preprocessing.sources import Listing, label_pairs
from loader_service.errors import DatasetInvalid, OptionError

VALIDATION_SHARE: Final = 0.1
"""Default fraction of each class for validation, if the source holds one split."""

Packed = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
Opener = Callable[[IO[bytes]], Packed]
COMPRESSIONS: Final[dict[bytes, Opener]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),  # its first argument is a file name
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""Decompressors by the first bytes of a file."""

HEAD_BYTES: Final = max(map(len, COMPRESSIONS))

COMPRESSED_SUFFIXES: Final = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")

MAX_STAMP_NS: Final = 2**60
"""Bound on the made-up modification times of remote archives: the year 2006, which every file system can store."""


class Inputs(msgspec.Struct, frozen=True):
    """The sources and the choice of the validation split, as the command line gives them.

    Fields:
        source: folder, archive or table; a folder or archive may be a URL.
        layout: one of :data:`layouts.LAYOUTS`, ``table`` or ``auto``.
        val: separate source of the validation split.
        val_fraction: fraction of each class to use for validation instead.
        val_list: file that lists the images to use for validation instead, one per line.
        classes: the only classes to use; empty for all.
    """

    source: Path | Url
    layout: str
    val: Path | Url | None
    val_fraction: float | None
    val_list: Path | None
    classes: tuple[str, ...]


def list_splits(inputs: Inputs, scratch: Path, seed: int) -> tuple[Listing, Listing | None]:
    """Return the listings of training and validation; None for validation if there is none.

    Args:
        inputs: the sources and options.
        scratch: folder for decompressed archives, see :func:`scratch_folder`.
        seed: seed of the choice by ``val_fraction``.

    Raises:
        OptionError: the options contradict each other or the source.
        DatasetInvalid: a source cannot be read or has no classes, or validation has classes that training lacks.
    """
    ways = {"--val-fraction": inputs.val_fraction, "--val-list": inputs.val_list, "--val": inputs.val}
    given = [(option, value) for option, value in ways.items() if value is not None]
    if len(given) > 1:
        (option, value), (second, _) = given[:2]
        raise OptionError(option, str(value), f"no {second} with it: only one of them may choose the validation split")
    found = find(plain(inputs.source, scratch), inputs.layout)
    train = label_pairs(inputs.source, _chosen(found.train, inputs.classes), None, found.form)
    if inputs.val is not None:
        other = find(plain(inputs.val, scratch), inputs.layout)
        # --val may hold both splits itself: use its validation split, else all of it.
        return train, _validation(inputs.val, other._replace(val=other.val or other.train), train, inputs.classes)
    if inputs.val_list is not None:
        return _split_by_list(train, inputs.val_list)
    if inputs.val_fraction is None and found.val is not None:
        return train, _validation(inputs.source, found, train, inputs.classes)
    share = VALIDATION_SHARE if inputs.val_fraction is None else inputs.val_fraction
    if share == 0:
        return train, None
    train, val = split_off(train, share, seed)
    if not val.items:
        raise DatasetInvalid(str(inputs.source), "no class has two images, so none can be used for validation")
    return train, val


def _split_by_list(listing: Listing, path: Path) -> tuple[Listing, Listing]:
    """Split a listing by a file that lists the sources of validation, one per line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        # `find` prints names like ./CLASS/name.jpg.
        train, val = split_listed(listing, [line.strip().removeprefix("./") for line in lines if line.strip()])
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise DatasetInvalid(
            path, f"it is not a list of images ({error}); each line must be a name such as CLASS/name.jpg"
        ) from error
    if not (train.items and val.items):
        raise DatasetInvalid(
            path, f"it names {len(val.items):,} of {len(listing.items):,} images, which leaves one split empty"
        )
    return train, val


def _validation(root: Path | Url, found: FoundSplits, train: Listing, classes: Sequence[str]) -> Listing:
    # A class has the number that it has in training.
    return label_pairs(root, _chosen(found.val or [], classes), train.class_names, found.form)


def _chosen(pairs: Pairs, classes: Sequence[str]) -> Pairs:
    """Return the files of the requested classes.

    Raises:
        OptionError: a requested class does not exist.
    """
    if not classes:
        return pairs
    if unknown := sorted(set(classes) - {name for _, name in pairs}):
        raise OptionError(
            "--classes", ",".join(classes), f"names of existing classes; there is no class {unknown[0]!r}"
        )
    return [(file, name) for file, name in pairs if name in classes]


def plain(source: Path | Url, scratch: Path) -> Path | Url:
    """Return the source itself; for a compressed archive, decompress it into ``scratch`` and return the copy.

    Raises:
        DatasetInvalid: it cannot be read or decompressed.
    """
    if isinstance(source, Url):
        return _fetched(source, scratch) if source.suffix in COMPRESSED_SUFFIXES else source
    if source.is_dir():
        return source
    try:
        with source.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if (opener := _opener(head)) is None:
            return source
        with source.open("rb") as file:
            return _unpacked(file, opener, scratch / f".{source.name}", source.stat().st_mtime_ns)
    # EOFError: the archive is cut off; zlib.error: gzip whose bytes are damaged.
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DatasetInvalid(source, f"it cannot be read or decompressed ({error})") from error


def _fetched(source: Url, scratch: Path) -> Path:
    """Download and decompress an archive at the same time, and return the decompressed copy.

    Raises:
        DatasetInvalid: there is no such archive, or it cannot be read or decompressed.
    """
    found = list_remote(source)
    if not found:
        raise DatasetInvalid(str(source), "there is no such archive")
    if len(found) > 1:
        raise DatasetInvalid(str(source), f"its name is that of an archive, but it is a folder of {len(found)} files")
    (listed,) = found
    try:
        with open_remote(source.text) as file:
            head = file.read(HEAD_BYTES)
        if (opener := _opener(head)) is None:
            raise DatasetInvalid(str(source), "its name says that it is compressed, but it is not gzip, bzip2 or xz")
        with open_remote(source.text) as file:  # open again: a server's answer may not be seekable
            name = PurePosixPath(source.text).name
            return _unpacked(file, opener, scratch / f".{name}", listed.stamp % MAX_STAMP_NS)
    except (DatasetInvalid, OptionError):  # raised above, and complete
        raise
    except Exception as error:  # every fsspec file system raises errors of its own
        raise DatasetInvalid(str(source), f"it cannot be read or decompressed ({error})") from error


def _opener(head: bytes) -> Opener | None:
    return next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None)


def _unpacked(file: IO[bytes], opener: Opener, stem: Path, stamp_ns: int) -> Path:
    """Decompress into a new file with the archive's modification time, so that a second run has the same input identity."""
    path = stem.with_name(f"{stem.name}.{secrets.token_hex(4)}.unpacked")  # build._clear() knows this form
    with opener(file) as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 2**20)
    os.utime(path, ns=(stamp_ns, stamp_ns))  # plan.identity() covers modification times
    return path


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield the folder for decompressed archives, which is ``out``; remove the archives at the end."""
    try:
        yield out
    finally:
        for path in out.glob(".*.unpacked"):
            path.unlink()
