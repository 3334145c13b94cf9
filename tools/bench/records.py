"""The records that all contestants read: several cuts of each photograph, in the same pixels in every format.

``FOLDER/raw/train.lmdb`` and ``FOLDER/jpeg/train.lmdb`` hold them as records, ``FOLDER/files/00012.jpg`` as JPEG files (the
payloads of the jpeg records), and ``FOLDER/labels.txt`` has one label per line. Peers make their own formats from these.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from loader_service.data.codecs import CODECS, DEFAULT_PARAMETERS, SHAPE, decode, encode
from loader_service.data.image_file import FILTER
from loader_service.data.writer import Writer
from loader_service.datasets.progress import Progress
from loader_service.datasets.statistics import Sums
from loader_service.types import RECORD_SIDE_PX
from tools.errors import ToolFailed
from tools.terminal import ROOT, SAMPLE_IMAGES

Pixels = npt.NDArray[np.uint8]

SIDE_SHARE: Final = (0.6, 1.0)
"""Smallest and largest side of a cut, as a share of the photograph's short side."""

SEED: Final = 1
SOURCES: Final = (ROOT.parent / "shared" / "data" / "imagenet-sample.tar", ROOT / SAMPLE_IMAGES)


class Facts(msgspec.Struct, frozen=True):
    """Facts about the records.

    Fields:
        records: number of records.
        photographs: number of photographs that they are cut from.
        source: name of the archive or folder of photographs.
        jpeg_bytes: mean size of a jpeg record's payload.
        psnr_db: mean peak signal-to-noise ratio of jpeg records, with raw ones as reference.
        parameters: parameters of the jpeg codec, for people.
    """

    records: int
    photographs: int
    source: str
    jpeg_bytes: float
    psnr_db: float
    parameters: str


def find_source() -> Path:
    """Return the first of SOURCES that exists.

    Raises:
        ToolFailed: none does.
    """
    for path in SOURCES:
        if path.exists():
            return path
    raise ToolFailed("there are no photographs; make some: python -m tools.sample_images build/sample-images")


def photographs(source: Path) -> list[bytes]:
    """Read the files of an archive, or all JPEG files below a folder, sorted by name.

    Raises:
        ToolFailed: there are none.
    """
    if source.is_dir():
        found = [path.read_bytes() for path in sorted(source.rglob("*.jpg"))]
    else:
        with tarfile.open(source) as archive:
            members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
            found = [content.read() for member in members if (content := archive.extractfile(member))]
    if not found:
        raise ToolFailed(f"{source} holds no photographs.")
    return found


def cuts(content: bytes, count: int, number: int) -> Iterator[Pixels]:
    """Yield square cuts of photograph ``number``, each resized to (256, 256, 3) uint8; a pure function of its arguments."""
    # (count, 3) float64 in [0, 1): side, column and row of each cut. The key is two 64-bit words, so photographs do not
    # share a stream, as they might with a sum of seed and number.
    draws = np.random.Generator(np.random.Philox(key=[SEED, number])).random((count, 3))
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    low, high = SIDE_SHARE
    for share, right, down in draws.tolist():
        side = (low + share * (high - low)) * min(image.size)
        left, top = right * (image.width - side), down * (image.height - side)
        box = (left, top, left + side, top + side)  # fractional: Pillow resamples from it, with no rounding to pixels
        yield np.asarray(image.resize((RECORD_SIDE_PX, RECORD_SIDE_PX), FILTER, box=box))


def make(folder: Path, source: Path, records: int) -> Facts:
    """Make the records in every format and return their facts; records that exist already are kept.

    ``FOLDER/facts.json`` is written last, so a folder without it is unfinished and is made again.
    """
    marker = folder / "facts.json"
    if marker.exists():
        return msgspec.json.decode(marker.read_bytes(), type=Facts)
    shutil.rmtree(folder, ignore_errors=True)  # an unfinished run's
    (folder / "files").mkdir(parents=True)
    # If there are more photographs than records, the first ones give one cut each.
    contents = photographs(source)[:records]
    each = -(-records // len(contents))  # rounded up; the last photograph may give fewer
    # Lazy: the cuts together are 1.6 GB at 8,192 records.
    every = ((number, pixels) for number, content in enumerate(contents) for pixels in cuts(content, each, number))
    labels, sizes, errors = _write(folder, every, records, len(contents))
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    parameters = ", ".join(f"{name} {value}" for name, value in DEFAULT_PARAMETERS["jpeg"].items())
    # At most 78 dB a record: an exact copy would divide by zero.
    psnr_db = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-3))))
    facts = Facts(len(labels), len(contents), source.name, float(np.mean(sizes)), psnr_db, parameters)
    marker.write_bytes(msgspec.json.encode(facts))
    return facts


def _write(
    folder: Path, every: Iterator[tuple[int, Pixels]], records: int, classes: int
) -> tuple[list[int], list[int], list[float]]:
    """Write both environments and the files; return label, jpeg bytes and mean squared error of each record."""
    labels, sizes, errors, sums = list[int](), list[int](), list[float](), Sums()
    names = tuple(f"photograph {number}" for number in range(classes))
    with (
        Writer(folder / "raw" / "train.lmdb", codec="raw", class_names=names) as raw,
        Writer(folder / "jpeg" / "train.lmdb", codec="jpeg", class_names=names) as jpeg,
        Progress("records", records, "records") as progress,
    ):
        # The range first: zip() then ends before it asks `every` for one cut too many.
        for number, (label, pixels) in zip(range(records), every, strict=False):
            payload = encode(pixels, "jpeg")
            decoded = decode(payload, CODECS["jpeg"])
            name = f"{number:05}.jpg"
            raw.put(label, encode(pixels, "raw"), name)
            jpeg.put(label, payload, name)
            (folder / "files" / name).write_bytes(payload)  # peers read the same JPEG bytes
            sums.add_picture(pixels.reshape(SHAPE))
            labels.append(label)
            sizes.append(len(payload))
            # float32 first: differences of uint8 wrap.
            errors.append(float(np.mean((pixels.astype(np.float32) - decoded) ** 2)))
            progress.advance()
        # Both get the statistics of the raw pixels, so that the colour shifts of a position do not depend on the codec.
        for writer in (raw, jpeg):
            writer.finish(sums.statistics(), made_by={"made by": "tools.bench"})
    return labels, sizes, errors
