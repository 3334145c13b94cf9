"""What there is to preprocess: from folders to lists of items, each with its label and where its bytes lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from loader_service.errors import DatasetInvalid

TRAIN_FOLDER: Final = "train"
VALIDATION_FOLDERS: Final = ("val", "valid", "validation", "test")
"""A folder with ``train`` and one of these holds both splits; the first that is there counts."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One picture that is to become a record.

    Fields:
        source: its name in the dataset, unique within its split; UTF-8 with other bytes escaped.
        label: its class's number.
        path: the file that holds it, as the system's bytes.
        stamp_ns: when that file was last changed.
        offset: where it starts in the file.
        size: its bytes; None is all that follow.
    """

    source: str
    label: int
    path: bytes
    stamp_ns: int
    offset: int = 0
    size: int | None = None


class Listing(msgspec.Struct, frozen=True):
    """The items of one split, in the order of their names, and the names of their classes by label."""

    root: Path
    class_names: tuple[str, ...]
    items: tuple[Item, ...]


def find_splits(source: Path) -> tuple[Path, Path | None]:
    """The training folder and, where there is one, the validation folder below ``source``."""
    train = source / TRAIN_FOLDER
    if train.is_dir():
        for name in VALIDATION_FOLDERS:
            if (source / name).is_dir():
                return train, source / name
    return source, None


def list_folder(root: Path, class_names: Sequence[str] | None = None) -> Listing:
    """The pictures of an image folder: ``root/CLASS/anything/below/name.jpg``.

    Every file counts that is not hidden, whatever it is called: what is no picture is rejected by name later.

    Args:
        root: the folder; its own folders, sorted by name, are the classes.
        class_names: the classes to use the labels of, instead of the folder's own.

    Raises:
        DatasetInvalid: it has no classes, none of them holds a file, or a class is not among ``class_names``.
    """
    own = sorted(_display(entry.name) for entry in _entries(root) if entry.is_dir())
    if not own:
        raise DatasetInvalid(root, "it has no folders for classes (CLASS/name.jpg)")
    labels = {name: label for label, name in enumerate(own if class_names is None else class_names)}
    if unknown := [name for name in own if name not in labels]:
        raise DatasetInvalid(
            root, f"its class {unknown[0]!r} is not among the {len(labels)} classes of training, whose labels it needs"
        )
    items = [
        Item(f"{_display(name)}/{below}", labels[_display(name)], path, stamp_ns, 0, size)
        for name in sorted(entry.name for entry in _entries(root) if entry.is_dir())
        for below, path, stamp_ns, size in _files_below(root / name)
    ]
    if not items:
        raise DatasetInvalid(root, f"its {len(own)} class folders hold no files")
    return Listing(root, tuple(labels), tuple(items))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DatasetInvalid(folder, f"the folder cannot be read ({error.strerror})") from error


def _files_below(folder: Path, prefix: str = "") -> Iterator[tuple[str, bytes, int, int]]:
    """Name below ``folder``, path, time of change and size of each file, sorted; links to folders are not followed."""
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        name = prefix + _display(entry.name)
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(folder / entry.name, f"{name}/")
        elif not entry.is_dir():
            try:
                status = entry.stat()
                yield name, os.fsencode(entry.path), status.st_mtime_ns, status.st_size
            except OSError:  # a link to nowhere: let it be rejected by name, as other files that cannot be read
                yield name, os.fsencode(entry.path), 0, 0


def _display(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
