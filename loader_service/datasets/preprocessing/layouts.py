"""The layouts of image collections: each finds splits of files with classes in a tree of files.

========== =====================================================================================================
tree       CLASS/name.jpg, or train/ and val/ (or valid/, validation/, test/) with such folders in them; a folder,
           a tar archive, or a tar of tars named after the classes
imagenet   a folder with ILSVRC2012_img_train.tar and, with ILSVRC2012_img_val.tar, a table of its labels or the devkit
kaggle     the folder ILSVRC of Kaggle's download: Data/CLS-LOC/train, Data/CLS-LOC/val and LOC_val_solution.csv
webdataset tar shards whose samples are name.jpg and name.cls; shards named val... or test... are validation
cifar      CIFAR-10's binary batches: data_batch_1.bin ... test_batch.bin and batches.meta.txt
table      a .csv or .jsonl file of path and label
========== =====================================================================================================
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import msgspec

from loader_service.datasets.preprocessing.devkit import find_devkit, label_by_devkit
from loader_service.datasets.preprocessing.remote import Url
from loader_service.datasets.preprocessing.sources import (
    VALIDATION_FOLDERS,
    File,
    Form,
    class_of,
    list_files,
    read_bytes,
    split_files,
    subtree,
)
from loader_service.errors import DatasetInvalid, PictureError

Pairs = list[tuple[File, str]]

TABLE_SUFFIXES: Final = (".csv", ".tsv", ".jsonl")
VALIDATION_TABLES: Final = ("LOC_val_solution.csv", "val.txt", "val_labels.txt")
"""Files that may hold the labels of ImageNet's validation images: Kaggle's table, or lines of a name and a class."""

CIFAR_SIDE_PX: Final = 32
CIFAR_PICTURE_BYTES: Final = CIFAR_SIDE_PX**2 * 3
CIFAR_RECORD_BYTES: Final = 1 + CIFAR_PICTURE_BYTES

CLASS_DIGITS: Final = 6
"""Class names that are numbers are padded with zeros to this width, so that names sort as numbers do."""


class FoundSplits(NamedTuple):
    """Files paired with class names, by split; ``val`` is None if the source holds one split."""

    train: Pairs
    val: Pairs | None
    form: Form = Form.PICTURE


def find(source: Path | Url, layout: str = "auto") -> FoundSplits:
    """Find the splits of a source.

    Args:
        source: folder, uncompressed tar archive, or table.
        layout: one of :data:`LAYOUTS`, ``table``, or ``auto`` to detect it.

    Raises:
        DatasetInvalid: the source is damaged, or in another layout.
    """
    if layout == "table" or (layout == "auto" and source.suffix in TABLE_SUFFIXES):
        if isinstance(source, Url):
            raise DatasetInvalid(str(source), "a table must be on this machine, as must the files that it names")
        if source.is_file():  # a folder may have such a name too, and any layout
            return FoundSplits(read_table(source), None)
    files = list_files(source)
    for name, look in LAYOUTS.items():
        if layout in ("auto", name) and (found := look(source, files)) is not None:
            return found
    raise DatasetInvalid(str(source), f"it does not have the layout {layout!r}")


def find_tree(_source: Path | Url, files: Sequence[File]) -> FoundSplits:
    """Find the splits of the layout ``tree``, which accepts everything that the other layouts do not."""
    train, val = split_files(files)
    return FoundSplits(_by_name(train), None if val is None else _by_name(val))


def find_imagenet(source: Path | Url, files: Sequence[File]) -> FoundSplits | None:
    """Find the splits of the layout ``imagenet``: ImageNet's own archives."""
    train = subtree(files, "ILSVRC2012_img_train")  # an archive counts as a folder with its name
    if not train:
        return None
    val = subtree(files, "ILSVRC2012_img_val")
    return FoundSplits(_by_name(train), _by_table(source, val, files) if val else None)


def find_kaggle(source: Path | Url, files: Sequence[File]) -> FoundSplits | None:
    """Find the splits of the layout ``kaggle``: Kaggle's download of ImageNet."""
    for prefix in ("", "ILSVRC/"):  # the source is the folder ILSVRC, or the folder that holds it
        train = subtree(files, f"{prefix}Data/CLS-LOC/train")
        if train:
            val = subtree(files, f"{prefix}Data/CLS-LOC/val")
            return FoundSplits(_by_name(train), _by_table(source, val, files) if val else None)
    return None


def find_webdataset(source: Path | Url, files: Sequence[File]) -> FoundSplits | None:
    """Find the splits of the layout ``webdataset``: the files of a sample agree up to the first dot of the base name."""
    classes = {_key(file): file for file in files if file.name.endswith(".cls")}
    if not classes:
        return None
    # All other files of a sample count as images; a worker rejects those that are none.
    pairs = [
        (file, _class_number(source, classes[key]))
        for file in files
        if (key := _key(file)) in classes and not file.name.endswith((".cls", ".json", ".txt"))
    ]
    # The name of a file starts with that of its shard, which list_files() turned into a folder.
    val = [pair for pair in pairs if pair[0].name.startswith(VALIDATION_FOLDERS)]
    train = [pair for pair in pairs if not pair[0].name.startswith(VALIDATION_FOLDERS)]
    return FoundSplits(train, val) if train and val else FoundSplits(pairs, None)  # only one split, by any name


def find_cifar(source: Path | Url, files: Sequence[File]) -> FoundSplits | None:
    """Find the splits of the layout ``cifar``: each record is one byte of label and 3,072 planar bytes of pixels."""
    by_name = {PurePosixPath(file.name).name: file for file in files}  # the distributed archive has a folder above
    if "data_batch_1.bin" not in by_name or "batches.meta.txt" not in by_name:
        return None
    names = _text(source, by_name["batches.meta.txt"]).split()
    train = [
        p
        for name, file in sorted(by_name.items())
        if name.startswith("data_batch")
        for p in _cifar(source, file, names)
    ]
    val = _cifar(source, by_name["test_batch.bin"], names) if "test_batch.bin" in by_name else None
    return FoundSplits(train, val, Form.CIFAR)


LAYOUTS: Final[dict[str, Callable[[Path | Url, Sequence[File]], FoundSplits | None]]] = {
    "cifar": find_cifar,
    "webdataset": find_webdataset,
    "imagenet": find_imagenet,
    "kaggle": find_kaggle,
    "tree": find_tree,
}
"""Layouts in the order of detection; ``tree`` accepts everything, so it is last."""


def read_table(source: Path) -> Pairs:
    """Read files and classes from a table: JSON lines with ``path`` and ``label``, or rows of a path and a label.

    Paths are relative to the table's folder.

    Raises:
        DatasetInvalid: a row is invalid; the error names it.
    """
    pairs = []
    for number, (path, label) in enumerate(_rows(source), 1):
        if not path or not label:
            raise DatasetInvalid(str(source), f"row {number} has no {'label' if path else 'path'}")
        on_disk = source.parent / path
        try:
            status = on_disk.stat()
            stamp_ns, size = status.st_mtime_ns, status.st_size
        except OSError:  # the worker rejects it, with its name and the reason
            stamp_ns, size = 0, 0
        pairs.append((File(path, os.fsencode(on_disk), stamp_ns, 0, size), label))
    if len({file.name for file, _ in pairs}) < len(pairs):  # a source must be unique within its split
        raise DatasetInvalid(str(source), "it names the same path twice")
    return pairs


class _Row(msgspec.Struct):
    path: str
    label: str | int


def _rows(source: Path) -> list[tuple[str, str]]:
    """Return path and label of each row; a header row ``path, label`` is skipped."""
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetInvalid(str(source), f"it cannot be read as text ({error})") from error
    if source.suffix == ".jsonl":
        try:
            return [(row.path, _named(row.label)) for row in msgspec.json.Decoder(_Row).decode_lines(text)]
        except msgspec.MsgspecError as error:
            raise DatasetInvalid(str(source), f"a line is not JSON with path and label ({error})") from error
    separator = "\t" if source.suffix == ".tsv" else ","
    rows = [row for row in csv.reader(text.splitlines(), delimiter=separator) if row]
    if rows and [cell.strip().lower() for cell in rows[0][:2]] == ["path", "label"]:
        rows = rows[1:]
    return [(row[0].strip(), _named(row[1].strip()) if len(row) > 1 else "") for row in rows]


def _named(label: str | int) -> str:
    """Return the class name of a label; numbers are padded so that they sort as numbers."""
    text = str(label)
    return text.zfill(CLASS_DIGITS) if text.isdecimal() else text


def _by_name(files: Sequence[File]) -> Pairs:
    return [(file, name) for file in files if (name := class_of(file))]


def _by_table(source: Path | Url, pictures: Sequence[File], files: Sequence[File]) -> Pairs:
    """Pair validation images with their classes, from the table or the development kit among the files.

    Raises:
        DatasetInvalid: there are no labels, or an image has none.
    """
    for file in files:
        if PurePosixPath(file.name).name in VALIDATION_TABLES:
            classes = _validation_classes(_text(source, file))
            break
    else:
        if kit := find_devkit(str(source), files):
            return label_by_devkit(str(source), kit, pictures)
        raise DatasetInvalid(
            str(source),
            f"the labels of its validation images are missing: add {VALIDATION_TABLES[0]} or "
            "ILSVRC2012_devkit_t12.tar.gz",
        )
    pairs = [(picture, classes.get(PurePosixPath(picture.name).stem)) for picture in pictures]
    if missing := [picture.name for picture, name in pairs if name is None]:
        raise DatasetInvalid(str(source), f"{file.name} has no label for {missing[0]} and {len(missing) - 1} others")
    return [(picture, name) for picture, name in pairs if name is not None]


def _validation_classes(text: str) -> Mapping[str, str]:
    """Return classes by file name without suffix, from lines like ``ILSVRC2012_val_00000001[.JPEG][, ]n01751748 ...``."""
    # A header row gives one entry more, which no image looks up. Kaggle's rows go on with boxes, which are ignored.
    rows = (line.replace(",", " ").split() for line in text.splitlines())
    return {PurePosixPath(row[0]).stem: row[1] for row in rows if len(row) > 1}


def _key(file: File) -> str:
    folder, _, name = file.name.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}"


def _class_number(source: Path | Url, file: File) -> str:
    text = _text(source, file).strip()
    if not text.isdecimal():
        raise DatasetInvalid(str(source), f"{file.name} does not hold the number of a class")
    return _named(text)


def _cifar(source: Path | Url, file: File, names: Sequence[str]) -> Pairs:
    """Return the records of one batch file as ranges of the file, with their classes."""
    content = _read(source, file)
    if not content or len(content) % CIFAR_RECORD_BYTES:
        raise DatasetInvalid(str(source), f"{file.name} does not consist of records of {CIFAR_RECORD_BYTES} bytes")
    labels = content[::CIFAR_RECORD_BYTES]  # the first byte of each record
    if max(labels) >= len(names):
        raise DatasetInvalid(
            str(source), f"{file.name} has label {max(labels)}, but only {len(names)} classes have names"
        )
    return [
        (
            msgspec.structs.replace(
                file,
                name=f"{file.name}/{number:05d}",
                offset=file.offset + number * CIFAR_RECORD_BYTES + 1,  # after the label
                size=CIFAR_PICTURE_BYTES,
            ),
            names[label],
        )
        for number, label in enumerate(labels)
    ]


def _text(source: Path | Url, file: File) -> str:
    return _read(source, file).decode("utf-8", "replace")


def _read(source: Path | Url, file: File) -> bytes:
    try:
        return read_bytes(file.path, file.name, file.offset, file.size)
    except PictureError as error:
        raise DatasetInvalid(str(source), f"{file.name} in it cannot be read: {error.reason}") from error
