"""ImageNet's development kit: labels of the validation images.

The kit numbers the classes from 1 to 1,000, and its ground truth has one number per line for each validation image. Only
``meta.mat`` maps the numbers to WordNet ids: a MATLAB file (version 5) with a struct array ``synsets``, which SciPy reads
(the extra ``devkit``). WordNet ids are the class names of the training set, so both splits get the same labels.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from loader_service.datasets.preprocessing.sources import File, read_bytes
from loader_service.errors import DatasetInvalid, OptionError, PictureError

GROUND_TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
META: Final = "meta.mat"
ARCHIVE: Final = re.compile(r"ILSVRC2012_devkit_t\d+\.(tar|tar\.gz|tgz)")

MAX_BYTES: Final = 2**26
"""Largest file of the kit that is read; the real ones have 2.5 MB packed and 1.4 MB unpacked."""

_PICTURE: Final = re.compile(r"ILSVRC2012_val_(\d{8})")
_WORDNET_ID: Final = re.compile(r"n\d{8}")


class Devkit(NamedTuple):
    """The two files of the kit that are needed, and their name in errors."""

    name: str
    ground_truth: bytes
    meta: bytes


def find_devkit(source: str, files: Sequence[File]) -> Devkit | None:
    """Find the kit among files, unpacked or as its distributed archive; return None if there is none.

    Raises:
        DatasetInvalid: the kit cannot be read, or lacks a file.
    """
    by_name = {PurePosixPath(file.name).name: file for file in files}  # the kit may lie in any folder
    if GROUND_TRUTH in by_name:
        if META not in by_name:
            raise DatasetInvalid(source, f"its {GROUND_TRUTH} has class numbers only: put the kit's {META} next to it")
        ground_truth, meta = by_name[GROUND_TRUTH], by_name[META]
        return Devkit(ground_truth.name, _content(source, ground_truth), _content(source, meta))
    packed = next((file for name, file in by_name.items() if ARCHIVE.fullmatch(name)), None)
    return _unpack(source, packed.name, _content(source, packed)) if packed else None


def label_by_devkit(source: str, kit: Devkit, pictures: Sequence[File]) -> list[tuple[File, str]]:
    """Pair validation images with the WordNet ids of their classes.

    Raises:
        DatasetInvalid: the kit is damaged, or has no label for an image.
    """
    names = _wordnet_ids(source, kit.meta)
    lines = kit.ground_truth.decode("ascii", "replace").split()
    pairs = []
    for picture in pictures:
        named = _PICTURE.fullmatch(PurePosixPath(picture.name).stem)
        number = int(named[1]) if named else 0  # 0 is no image: they count from 1
        if not 1 <= number <= len(lines):
            raise DatasetInvalid(source, f"{kit.name} has {len(lines):,} lines, and none of them is for {picture.name}")
        line = lines[number - 1]
        name = names.get(int(line)) if line.isdecimal() else None
        if name is None:
            raise DatasetInvalid(source, f"line {number} of {kit.name} is {line!r}, which is no class of {META}")
        pairs.append((picture, name))
    return pairs


def _wordnet_ids(source: str, meta: bytes) -> Mapping[int, str]:
    """Return the WordNet ids by the kit's class numbers."""
    try:
        from scipy.io import loadmat  # an optional extra
    except ImportError as error:
        need = "SciPy to read the kit's meta.mat: `pip install 'loader-service[devkit]'`"
        raise OptionError("SRC", source, f"a table of validation labels, or {need}") from error
    try:
        # squeeze_me drops axes of length 1; reshape() brings one back for a struct array of one.
        synsets = loadmat(BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"].reshape(-1)
        numbers = [int(number) for number in synsets["ILSVRC2012_ID"]]
        names = [str(name) for name in synsets["WNID"]]
    except Exception as error:  # SciPy documents no errors, and damaged files raise a dozen kinds
        raise DatasetInvalid(source, f"its {META} is not the kit's ({type(error).__name__}: {error})") from error
    found = dict(zip(numbers, names, strict=True))
    if len(found) < len(numbers) or not all(_WORDNET_ID.fullmatch(name) for name in names):
        raise DatasetInvalid(
            source, f"its {META} is not the kit's: it has duplicate numbers, or names that are not WordNet ids"
        )
    return found


def _unpack(source: str, name: str, content: bytes) -> Devkit:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            for member in archive:
                base = PurePosixPath(member.name).name
                # tarfile reads no more of a member than its header says, so this bounds the memory.
                if base in (GROUND_TRUTH, META) and member.isfile() and member.size <= MAX_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None, "it is a file"
                    found[base] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DatasetInvalid(source, f"{name} cannot be read ({error})") from error
    if lacking := [base for base in (GROUND_TRUTH, META) if base not in found]:
        raise DatasetInvalid(source, f"{name} holds no {lacking[0]}")
    return Devkit(f"{GROUND_TRUTH} in {name}", found[GROUND_TRUTH], found[META])


def _content(source: str, file: File) -> bytes:
    if file.size > MAX_BYTES:
        raise DatasetInvalid(source, f"{file.name} has {file.size:,} bytes, more than any file of the kit")
    try:
        return read_bytes(file.path, file.name, file.offset, file.size)
    except PictureError as error:
        raise DatasetInvalid(source, f"{file.name} cannot be read: {error.reason}") from error
