"""The sources of images: trees of files in folders and archives, and the labelled items found in them.

A folder, a tar archive and a tar of tars (ImageNet's training set as distributed) all become the same tree of files: names
with slashes, and for each the place of its bytes. Archives are never unpacked. A compressed archive is decompressed as a
whole, because its members cannot be read one by one.
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

from loader_service.data.image_file import read_content
from loader_service.datasets.preprocessing.remote import URL, Url, list_remote, open_remote, read_remote
from loader_service.errors import DatasetInvalid

TRAIN_FOLDER: Final = "train"
VALIDATION_FOLDERS: Final = ("val", "valid", "validation", "test")
"""A tree with ``train/`` and one of these folders holds both splits; the first that exists is used."""

WORDNET_FILE: Final = re.compile(r"(n[0-9]{8})_[^/]+")
"""ImageNet's file names start with their class: n01440764_10026.JPEG."""


class Form(Enum):
    """The encodings of an item's bytes: an image file, or the 3,072 planar RGB bytes of a CIFAR record."""

    PICTURE = "picture"
    CIFAR = "cifar"


class File(msgspec.Struct, frozen=True):
    """One file of a tree.

    Fields:
        name: name within the tree, with slashes; bytes that are not UTF-8 are escaped.
        path: path of the file or of its archive on disk, as the system's bytes; or its URL.
        stamp_ns: modification time of ``path``; of a URL, a number that changes with it.
        offset: offset of the file's first byte in ``path``.
        size: bytes of the file.
    """

    name: str
    path: bytes
    stamp_ns: int
    offset: int
    size: int


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One image that is to become a record.

    Fields:
        source: name in the dataset, unique within the split.
        label: number of the class.
        path, stamp_ns, offset, size: as in :class:`File`.
        form: encoding of the bytes.
    """

    source: str
    label: int
    path: bytes
    stamp_ns: int
    offset: int
    size: int
    form: Form = Form.PICTURE


class Listing(msgspec.Struct, frozen=True):
    """The items of one split, sorted by name, and the class names by label."""

    root: Path | Url
    class_names: tuple[str, ...]
    items: tuple[Item, ...]


def list_files(root: Path | Url) -> list[File]:
    """List the files of a folder or an uncompressed tar archive, local or remote, sorted by name, without hidden files.

    A tar archive inside of an archive, or directly in the folder, counts as a folder with its name, without ``.tar``.

    Raises:
        DatasetInvalid: the source cannot be read.
    """
    if isinstance(root, Url):
        files = _files_behind(root)
    else:
        files = _files_in_archive(root) if root.is_file() else _files_below(root)
    return sorted(files, key=lambda file: file.name)  # the order of a folder depends on its file system


def split_files(files: Sequence[File]) -> tuple[list[File], list[File] | None]:
    """Return training files and, if the tree holds both splits, validation files, with names below the splits' folders."""
    tops = {file.name.split("/", 1)[0] for file in files if "/" in file.name}
    if TRAIN_FOLDER in tops:
        for name in VALIDATION_FOLDERS:
            if name in tops:
                return subtree(files, TRAIN_FOLDER), subtree(files, name)
    return list(files), None


def subtree(files: Sequence[File], folder: str) -> list[File]:
    """Return the files below one folder of a tree, with names relative to it."""
    prefix = f"{folder}/"
    return [
        msgspec.structs.replace(file, name=file.name.removeprefix(prefix))
        for file in files
        if file.name.startswith(prefix)
    ]


def label_files(root: Path | Url, files: Sequence[File], class_names: Sequence[str] | None = None) -> Listing:
    """Convert files to items: ``CLASS/anything/below/name.jpg``, or ImageNet's file names that start with the class.

    Every file with a class becomes an item, whatever its suffix: a worker rejects it later if it is not an image.

    Args:
        root: name of the tree in errors.
        files: files of one split.
        class_names: class names by label; None numbers the tree's own classes, sorted by name.

    Raises:
        DatasetInvalid: no file has a class, or a class is not among ``class_names``.
    """
    classes = [(file, name) for file in files if (name := class_of(file))]
    return label_pairs(root, classes, class_names)


def class_of(file: File) -> str | None:
    """Return the class that a file's name states, or None."""
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
    """Convert files with class names to items; see :func:`label_files`."""
    own = sorted({name for _, name in pairs})  # sorted: labels do not depend on the order of files
    if not own:
        raise DatasetInvalid(str(root), "it holds no files in folders for classes (CLASS/name.jpg)")
    labels = {name: label for label, name in enumerate(own if class_names is None else class_names)}
    if unknown := [name for name in own if name not in labels]:
        raise DatasetInvalid(
            str(root),
            f"its class {unknown[0]!r} is not among the {len(labels)} classes of the training split",
        )
    items = (
        Item(file.name, labels[name], file.path, file.stamp_ns, file.offset, file.size, form) for file, name in pairs
    )
    return Listing(root, tuple(labels), tuple(items))


def _files_below(folder: Path, prefix: str = "") -> Iterator[File]:
    """Iterate over the files below a folder. Links to folders are followed at its top only: deeper ones may form cycles."""
    for entry in _entries(folder):
        name = prefix + _display(os.fsencode(entry.name))
        if entry.is_dir(follow_symlinks=not prefix):  # prefix is "" at the top
            yield from _files_below(folder / entry.name, f"{name}/")
        elif not prefix and name.endswith(".tar") and entry.is_file():
            below = f"{name.removesuffix('.tar')}/"
            yield from (msgspec.structs.replace(f, name=below + f.name) for f in _files_in_archive(Path(entry.path)))
        elif not entry.is_dir():  # excludes deeper links to folders
            try:
                status = entry.stat()
                stamp_ns, size = status.st_mtime_ns, status.st_size
            except OSError:  # a broken link: a worker rejects it, as every file that cannot be read
                stamp_ns, size = 0, 0
            yield File(name, os.fsencode(entry.path), stamp_ns, 0, size)


def _files_behind(root: Url) -> Iterator[File]:
    """Iterate over the files at or below a URL; archives are treated as in a folder on disk."""
    for name, url, stamp, size in list_remote(root):
        path = url.encode()
        if not name or ("/" not in name and name.endswith(".tar")):  # "": the URL is an archive itself
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
    """Return the bytes of a :class:`File` or an :class:`Item`.

    Raises:
        PictureError: the file cannot be read.
        PreprocessingFailed: its URL cannot be read now.
    """
    name = os.fsdecode(path)
    if URL.fullmatch(name):
        return read_remote(name, source, offset, size)
    return read_content(Path(name), source, offset, size)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DatasetInvalid(folder, f"the folder cannot be read ({error.strerror})") from error


def _files_in_archive(path: Path) -> Iterator[File]:
    """Iterate over the files in a tar archive and in tar archives within it."""
    stamp_ns = path.stat().st_mtime_ns
    try:
        with path.open("rb") as file:
            for name, offset, size in _visible_members(file):
                yield File(name, os.fsencode(path), stamp_ns, offset, size)
    except (tarfile.TarError, OSError) as error:
        raise DatasetInvalid(path, f"it cannot be read as a tar archive ({error})") from error


def _visible_members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Iterate over name, offset and size of each file in an archive, without hidden files."""
    return (m for m in _members(file, 0, "") if not any(part.startswith(".") for part in m[0].split("/")))


def _members(file: IO[bytes], start: int, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Iterate over name, offset in ``file`` and size of each file in the archive that starts at ``start``."""
    file.seek(start)
    # "r:": members of a compressed archive have no offsets. surrogateescape: os.fsencode() gives back a name's bytes.
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member: a gigabyte for ImageNet
            name = prefix + _display(os.fsencode(member.name)).removeprefix("./")  # `tar c .` writes ./a/b
            if member.isfile() and name.endswith(".tar"):
                # It moves the position of `file`; tarfile seeks before it reads the next header.
                yield from _members(file, member.offset_data, f"{name.removesuffix('.tar')}/")
            elif member.isfile():
                yield name, member.offset_data, member.size


def _display(name: bytes) -> str:
    """Return a file's name as text; bytes that are not UTF-8 become escapes."""
    return name.decode("utf-8", "backslashreplace")
