"""What there is to preprocess: trees of files in folders and archives, and the labelled items found in them.

A tree of files is the same thing in a folder, in a tar archive and in a tar of tars (ImageNet's training set as it is
distributed): names with slashes, and for each where its bytes lie. Archives are never unpacked; a compressed one is
decompressed as a whole, since nothing inside it can be read on its own.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Final

import msgspec

from loader_service.data.picture import read_content
from loader_service.datasets.preprocessing.remote import URL, Url, list_remote, open_remote, read_remote
from loader_service.errors import DatasetInvalid

TRAIN_FOLDER: Final = "train"
VALIDATION_FOLDERS: Final = ("val", "valid", "validation", "test")
"""A tree with ``train/`` and one of these holds both splits; the first that is there counts."""

WORDNET_FILE: Final = re.compile(r"(n[0-9]{8})_[^/]+")
"""ImageNet's files name their class: n01440764_10026.JPEG."""


class Form(Enum):
    """The encodings of an item's bytes: an image file, or the 3,072 planar RGB bytes of a CIFAR record."""

    PICTURE = "picture"
    CIFAR = "cifar"


class File(msgspec.Struct, frozen=True):
    """One file of a tree.

    Fields:
        name: within the tree, with slashes; UTF-8 with other bytes escaped.
        path: the file on disk that it is or lies in, as the system's bytes; or its URL.
        stamp_ns: when that was last changed; of a URL, another number that changes with it.
        offset: where it starts in there.
        size: its bytes.
    """

    name: str
    path: bytes
    stamp_ns: int
    offset: int
    size: int


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One picture that is to become a record.

    Fields:
        source: its name in the dataset, unique within its split.
        label: its class's number.
        path, stamp_ns, offset, size: as those of a :class:`File`.
        form: the encoding of its bytes.
    """

    source: str
    label: int
    path: bytes
    stamp_ns: int
    offset: int
    size: int
    form: Form = Form.PICTURE


class Listing(msgspec.Struct, frozen=True):
    """The items of one split, in the order of their names, and the names of their classes by label."""

    root: Path | Url
    class_names: tuple[str, ...]
    items: tuple[Item, ...]


def list_files(root: Path | Url) -> list[File]:
    """The files of a folder or an uncompressed tar archive, here or behind a URL, by name; hidden ones are left out.

    An archive that lies in an archive or directly in the folder is looked into: its files have names below its own.

    Raises:
        DatasetInvalid: it cannot be read.
    """
    if isinstance(root, Url):
        files = _files_behind(root)
    else:
        files = _files_in_archive(root) if root.is_file() else _files_below(root)
    return sorted(files, key=lambda file: file.name)


def split_files(files: Sequence[File]) -> tuple[list[File], list[File] | None]:
    """Training files and, where the tree holds both splits, validation files, without the splits' folder names."""
    tops = {file.name.split("/", 1)[0] for file in files if "/" in file.name}
    if TRAIN_FOLDER in tops:
        for name in VALIDATION_FOLDERS:
            if name in tops:
                return subtree(files, TRAIN_FOLDER), subtree(files, name)
    return list(files), None


def subtree(files: Sequence[File], folder: str) -> list[File]:
    """The files below one folder of a tree, by their names from there."""
    prefix = f"{folder}/"
    return [
        msgspec.structs.replace(file, name=file.name.removeprefix(prefix))
        for file in files
        if file.name.startswith(prefix)
    ]


def label_files(root: Path | Url, files: Sequence[File], class_names: Sequence[str] | None = None) -> Listing:
    """Files as items: ``CLASS/anything/below/name.jpg``, or ImageNet's file names that begin with their class.

    Every file in a class counts, whatever it is called: what is no picture is rejected by name later.

    Args:
        root: what to call the tree in an error.
        files: of one split.
        class_names: the classes to use the labels of, instead of the tree's own, sorted by name.

    Raises:
        DatasetInvalid: no file has a class, or a class is not among ``class_names``.
    """
    classes = [(file, name) for file in files if (name := class_of(file))]
    return label_pairs(root, classes, class_names)


def class_of(file: File) -> str | None:
    """The class that a file's name says, if it says one."""
    top, slash, _ = file.name.partition("/")
    if slash:
        return top
    named = WORDNET_FILE.fullmatch(file.name)
    return named[1] if named else None


def label_pairs(
    root: Path | Url,
    pairs: Sequence[tuple[File, str]],
    class_names: Sequence[str] | None = None,
    form: Form = Form.PICTURE,
) -> Listing:
    """Files with their classes' names as items; see :func:`label_files`."""
    own = sorted({name for _, name in pairs})
    if not own:
        raise DatasetInvalid(str(root), "it holds no files in folders for classes (CLASS/name.jpg)")
    labels = {name: label for label, name in enumerate(own if class_names is None else class_names)}
    if unknown := [name for name in own if name not in labels]:
        raise DatasetInvalid(
            str(root),
            f"its class {unknown[0]!r} is not among the {len(labels)} classes of training, whose labels it needs",
        )
    items = (
        Item(file.name, labels[name], file.path, file.stamp_ns, file.offset, file.size, form) for file, name in pairs
    )
    return Listing(root, tuple(labels), tuple(items))


def _files_below(folder: Path, prefix: str = "") -> Iterator[File]:
    """The files below a folder; links to folders count at its top only, since deeper ones may go round in circles."""
    for entry in _entries(folder):
        name = prefix + _display(os.fsencode(entry.name))
        if entry.is_dir(follow_symlinks=not prefix):
            yield from _files_below(folder / entry.name, f"{name}/")
        elif not prefix and name.endswith(".tar") and entry.is_file():
            below = f"{name.removesuffix('.tar')}/"
            yield from (msgspec.structs.replace(f, name=below + f.name) for f in _files_in_archive(Path(entry.path)))
        elif not entry.is_dir():
            try:
                status = entry.stat()
                stamp_ns, size = status.st_mtime_ns, status.st_size
            except OSError:  # a link to nowhere: let it be rejected by name, as other files that cannot be read
                stamp_ns, size = 0, 0
            yield File(name, os.fsencode(entry.path), stamp_ns, 0, size)


def _files_behind(root: Url) -> Iterator[File]:
    """The files behind a URL; archives count as they do in a folder on disk."""
    for name, url, stamp, size in list_remote(root):
        path = url.encode()
        if not name or ("/" not in name and name.endswith(".tar")):
            below = f"{name.removesuffix('.tar')}/" if name else ""
            try:
                with open_remote(url) as file:
                    for member, offset, length in _visible_members(file):
                        yield File(below + member, path, stamp, offset, length)
            except (tarfile.TarError, OSError) as error:
                raise DatasetInvalid(url, f"it cannot be read as a tar archive ({error})") from error
        elif not any(part.startswith(".") for part in name.split("/")):
            yield File(name, path, stamp, 0, size)


def read_bytes(path: bytes, source: str, offset: int, size: int) -> bytes:
    """The bytes of a :class:`File` or an :class:`Item`.

    Raises:
        PictureError: it cannot be read.
        ToolFailed: it lies behind a URL and cannot be had now.
    """
    name = os.fsdecode(path)
    if URL.fullmatch(name):
        return read_remote(name, source, offset, size)
    return read_content(Path(name), source, offset, size)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DatasetInvalid(folder, f"the folder cannot be read ({error.strerror})") from error


def _files_in_archive(path: Path) -> Iterator[File]:
    """The files in a tar archive; those of a tar inside of it lie below the inner archive's name, less ``.tar``."""
    stamp_ns = path.stat().st_mtime_ns
    try:
        with path.open("rb") as file:
            for name, offset, size in _visible_members(file):
                yield File(name, os.fsencode(path), stamp_ns, offset, size)
    except (tarfile.TarError, OSError) as error:
        raise DatasetInvalid(path, f"it cannot be read as a tar archive ({error})") from error


def _visible_members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in an archive that is not hidden."""
    return (m for m in _members(file, 0, "") if not any(part.startswith(".") for part in m[0].split("/")))


def _members(file: IO[bytes], start: int, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of each member of the archive that starts at ``start``."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # else every member is kept: a gigabyte for ImageNet
            name = prefix + _display(os.fsencode(member.name)).removeprefix("./")
            if member.isfile() and name.endswith(".tar"):
                yield from _members(file, member.offset_data, f"{name.removesuffix('.tar')}/")
            elif member.isfile():
                yield name, member.offset_data, member.size


def _display(name: bytes) -> str:
    """A file's name as text: bytes that are not UTF-8 become escapes."""
    return name.decode("utf-8", "backslashreplace")
