"""From what the command line names to the listings of both splits."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from loader_service.errors import DatasetInvalid, OptionError
from tools.preprocess.layouts import Found, Pairs, find
from tools.preprocess.plan import split_off
from tools.preprocess.remote import Url
from tools.preprocess.sources import Listing, label_pairs

VALIDATION_SHARE: Final = 0.1
"""Of each class, where the source holds one split and no share is named."""

Opener = type[gzip.GzipFile] | type[bz2.BZ2File] | type[lzma.LZMAFile]
COMPRESSIONS: Final[dict[bytes, Opener]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}

COMPRESSED_SUFFIXES: Final = (".gz", ".tgz", ".bz2", ".xz", ".zst")


class Inputs(msgspec.Struct, frozen=True):
    """What is to be preprocessed, as the command line says it.

    Fields:
        source: a folder, an archive or a table; the first two also behind a URL.
        layout: of :data:`layouts.LAYOUTS`, ``table`` or ``auto``.
        val: a source of its own for validation.
        val_fraction: share of each class to take for validation instead.
        classes: the only classes to take; empty takes all.
    """

    source: Path | Url
    layout: str
    val: Path | Url | None
    val_fraction: float | None
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
    if inputs.val is not None and inputs.val_fraction is not None:
        raise OptionError("--val-fraction", inputs.val_fraction, "no --val beside it, which names the validation split")
    found = find(plain(inputs.source, scratch), inputs.layout)
    train = label_pairs(inputs.source, _chosen(found.train, inputs.classes), None, found.form)
    if inputs.val is not None:
        other = find(plain(inputs.val, scratch), inputs.layout)
        return train, _validation(inputs.val, other._replace(val=other.val or other.train), train, inputs.classes)
    if inputs.val_fraction is None and found.val is not None:
        return train, _validation(inputs.source, found, train, inputs.classes)
    share = VALIDATION_SHARE if inputs.val_fraction is None else inputs.val_fraction
    if share == 0:
        return train, None
    train, val = split_off(train, share, seed)
    if not val.items:
        raise DatasetInvalid(str(inputs.source), "no class has two pictures, so none can be taken for validation")
    return train, val


def _validation(root: Path | Url, found: Found, train: Listing, classes: Sequence[str]) -> Listing:
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
    """The source itself or, where it is a compressed archive, its decompressed twin in ``scratch``.

    Raises:
        DatasetInvalid: it cannot be read or decompressed.
    """
    if isinstance(source, Url):
        if source.suffix in COMPRESSED_SUFFIXES:
            raise DatasetInvalid(str(source), "a compressed archive cannot be read in parts: fetch it first")
        return source
    if source.is_dir():
        return source
    try:
        with source.open("rb") as file:
            head = file.read(6)
        opener = next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None)
        if opener is None:
            return source
        twin = scratch / f".{source.name}.{secrets.token_hex(4)}.unpacked"
        with opener(source, "rb") as packed, twin.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
        stamp_ns = source.stat().st_mtime_ns
        os.utime(twin, ns=(stamp_ns, stamp_ns))  # the archive's own, so that a second run knows its files again
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DatasetInvalid(source, f"it cannot be read or decompressed ({error})") from error
    return twin


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Where decompressed archives go: ``out``, from which they are removed at the end."""
    try:
        yield out
    finally:
        for path in out.glob(".*.unpacked"):
            path.unlink()
