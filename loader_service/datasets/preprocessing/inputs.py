"""From what the command line names to the listings of both splits."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import secrets
import shutil
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
"""Of each class, where the source holds one split and no share is named."""

Packed = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
Opener = Callable[[IO[bytes]], Packed]
COMPRESSIONS: Final[dict[bytes, Opener]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""By the first bytes of a file."""

HEAD_BYTES: Final = max(map(len, COMPRESSIONS))

COMPRESSED_SUFFIXES: Final = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")

MAX_STAMP_NS: Final = 2**60
"""File systems keep times of change up to the year 2038 at least; these reach 2006."""


class Inputs(msgspec.Struct, frozen=True):
    """What is to be preprocessed, as the command line says it.

    Fields:
        source: a folder, an archive or a table; the first two also behind a URL.
        layout: of :data:`layouts.LAYOUTS`, ``table`` or ``auto``.
        val: a source of its own for validation.
        val_fraction: share of each class to take for validation instead.
        val_list: a file that names, one a line, the pictures to take for validation instead.
        classes: the only classes to take; empty takes all.
    """

    source: Path | Url
    layout: str
    val: Path | Url | None
    val_fraction: float | None
    val_list: Path | None
    classes: tuple[str, ...]


def list_splits(inputs: Inputs, scratch: Path, seed: int) -> tuple[Listing, Listing | None]:
    """The listings of training and validation.

    Args:
        inputs: what to list.
        scratch: where decompressed archives lie, see :func:`decompressed`.
        seed: of the choice of ``val_fraction``.

    Raises:
        OptionError: the options contradict each other or the source.
        DatasetInvalid: a source cannot be read, holds no classes, or validation has classes of its own.
    """
    ways = {"--val-fraction": inputs.val_fraction, "--val-list": inputs.val_list, "--val": inputs.val}
    given = [(option, value) for option, value in ways.items() if value is not None]
    if len(given) > 1:
        (option, value), (second, _) = given[:2]
        raise OptionError(option, str(value), f"no {second} beside it, which names the validation split too")
    found = find(plain(inputs.source, scratch), inputs.layout)
    train = label_pairs(inputs.source, _chosen(found.train, inputs.classes), None, found.form)
    if inputs.val is not None:
        other = find(plain(inputs.val, scratch), inputs.layout)
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
        raise DatasetInvalid(str(inputs.source), "no class has two pictures, so none can be taken for validation")
    return train, val


def _split_by_list(listing: Listing, path: Path) -> tuple[Listing, Listing]:
    """Training and validation, as a list of sources has it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        train, val = split_listed(listing, [line.strip().removeprefix("./") for line in lines if line.strip()])
    except (OSError, ValueError) as error:  # what is no UTF-8 is a ValueError
        raise DatasetInvalid(
            path, f"it is no list of pictures ({error}); each line is a name such as CLASS/name.jpg"
        ) from error
    if not (train.items and val.items):
        raise DatasetInvalid(
            path, f"it names {len(val.items):,} of {len(listing.items):,} pictures, and leaves one split empty"
        )
    return train, val


def _validation(root: Path | Url, found: FoundSplits, train: Listing, classes: Sequence[str]) -> Listing:
    return label_pairs(root, _chosen(found.val or [], classes), train.class_names, found.form)


def _chosen(pairs: Pairs, classes: Sequence[str]) -> Pairs:
    """The files of the classes that are asked for."""
    if not classes:
        return pairs
    if unknown := sorted(set(classes) - {name for _, name in pairs}):
        raise OptionError(
            "--classes", ",".join(classes), f"names of classes that are there, which {unknown[0]!r} is not"
        )
    return [(file, name) for file, name in pairs if name in classes]


def plain(source: Path | Url, scratch: Path) -> Path | Url:
    """The source itself or, where it is a compressed archive, its decompressed path in ``scratch``.

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
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DatasetInvalid(source, f"it cannot be read or decompressed ({error})") from error


def _fetched(source: Url, scratch: Path) -> Path:
    """The decompressed path of an archive behind a URL, decompressed while it is read."""
    (listed,) = list_remote(source) or (None,)
    if listed is None:
        raise DatasetInvalid(str(source), "there is no such archive")
    try:
        with open_remote(source.text) as file:
            head = file.read(HEAD_BYTES)
        if (opener := _opener(head)) is None:
            raise DatasetInvalid(str(source), "it is not compressed by gzip, bzip2 or xz, as its name would have it")
        with open_remote(source.text) as file:  # anew: what a server sends may be read forwards only
            name = PurePosixPath(source.text).name
            return _unpacked(file, opener, scratch / f".{name}", listed.stamp % MAX_STAMP_NS)
    except (DatasetInvalid, OptionError):
        raise
    except Exception as error:  # each file system has errors of its own
        raise DatasetInvalid(str(source), f"it cannot be read or decompressed ({error})") from error


def _opener(head: bytes) -> Opener | None:
    return next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None)


def _unpacked(file: IO[bytes], opener: Opener, stem: Path, stamp_ns: int) -> Path:
    """Decompress into a new file whose time of change is the archive's own, so that a second run knows its files again."""
    path = stem.with_name(f"{stem.name}.{secrets.token_hex(4)}.unpacked")
    with opener(file) as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 2**20)
    os.utime(path, ns=(stamp_ns, stamp_ns))
    return path


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Where decompressed archives go: ``out``, from which they are removed at the end."""
    try:
        yield out
    finally:
        for path in out.glob(".*.unpacked"):
            path.unlink()
