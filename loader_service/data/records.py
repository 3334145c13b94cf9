"""The LMDB environment of one split: its records, their source names and its manifest.

Layout (format 1). An environment is a directory with LMDB's ``data.mdb`` and three named sub-databases:

======== =========================== =====================================================================
database key                         value
======== =========================== =====================================================================
records  record number, 8 bytes BE   HEADER (label, codec, xxh3-64 of the payload), then the payload
sources  record number, 8 bytes BE   the source's name, UTF-8
manifest ``manifest``                :class:`Manifest` as MessagePack; written last, so none means unfinished
======== =========================== =====================================================================

A payload is ``raw``, (256, 256, 3) uint8 RGB in C order, ``jpeg``, or ``centered`` (see :mod:`centred`). Environments are opened without LMDB's lock file:
a finished environment never changes, so readers need none and read-only mounts work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt
import simplejpeg
import xxhash

from loader_service.data.centred import FRACTION_BITS, centre_of, decode_centred
from loader_service.errors import DatasetInvalid, DatasetNotFound, DatasetUnfinished, RecordError
from loader_service.spec import RECORD_SIDE_PX

FORMAT: Final = 1
HEADER: Final = struct.Struct("<IBxxxQ")
"""label, codec number, xxh3-64 of the payload: 16 bytes."""
KEY: Final = struct.Struct(">Q")
SHAPE: Final = (RECORD_SIDE_PX, RECORD_SIDE_PX, 3)
RAW_BYTES: Final = RECORD_SIDE_PX * RECORD_SIDE_PX * 3
MAX_CLASSES: Final = 2**20
DATABASES: Final = (b"records", b"sources", b"manifest")

Codec = Literal["raw", "jpeg", "centered"]
CODECS: Final[dict[Codec, int]] = {"raw": 0, "jpeg": 1, "centered": 2}
DEFAULT_PARAMETERS: Final[dict[Codec, dict[str, int | str]]] = {
    "raw": {},
    "jpeg": {"quality": 90, "subsampling": "420"},
    "centered": {"fraction_bits": FRACTION_BITS},
}

Pixels = npt.NDArray[np.uint8]
Found = tuple[int, int, int, memoryview]
"""A record as it lies: label, codec number, checksum, payload."""
Floats = Annotated[tuple[float, ...], msgspec.Meta(max_length=9)]


@dataclass(frozen=True)
class Statistics:
    """What the training split's pixels say about colour; computed from exact integer sums.

    Fields:
        mean_image: (256, 256, 3) float32, the mean of each pixel, 0..255.
        channel_means: (3,) float64, 0..255.
        covariance: (3, 3) float64, of RGB values in 0..1 over all pixels.
        eigenvalues: (3,) float64, of the covariance, the largest first.
        eigenvectors: (3, 3) float64; column k belongs to eigenvalue k; its component of largest magnitude is positive.
    """

    mean_image: npt.NDArray[np.float32]
    channel_means: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]


class Rejected(msgspec.Struct, frozen=True):
    """A source that became no record, and why."""

    source: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an environment says of itself.

    ``fingerprint`` covers the logical records and the statistics, not the file's bytes; ``golden`` is the hash of
    sixteen fixed samples, by which a node shows that it would make the same bytes.
    """

    format: int
    count: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    size: int
    codec: Codec
    codec_parameters: dict[str, int | str]
    class_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_CLASSES)]
    class_counts: tuple[int, ...]
    mean_image: bytes
    channel_means: Floats
    covariance: Floats
    eigenvalues: Floats
    eigenvectors: Floats
    made_by: dict[str, str]
    rejected: tuple[Rejected, ...]
    fingerprint: str
    golden: str

    @property
    def statistics(self) -> Statistics:
        """The statistics as arrays."""
        return Statistics(
            mean_image=np.frombuffer(self.mean_image, "<f4").reshape(SHAPE),
            channel_means=np.array(self.channel_means),
            covariance=np.array(self.covariance).reshape(3, 3),
            eigenvalues=np.array(self.eigenvalues),
            eigenvectors=np.array(self.eigenvectors).reshape(3, 3),
        )

    def flaw(self) -> str:
        """What is wrong with this manifest beyond its types; empty if nothing."""
        if self.format != FORMAT:
            return f"it is of format {self.format}, and this version reads format {FORMAT}: preprocess the images again"
        if self.size != RECORD_SIDE_PX or len(self.mean_image) != RAW_BYTES * 4:
            return f"its records are {self.size} pixels wide, not {RECORD_SIDE_PX}"
        lengths = [len(v) for v in (self.channel_means, self.covariance, self.eigenvalues, self.eigenvectors)]
        if lengths != [3, 9, 3, 9] or len(self.class_counts) != len(self.class_names):
            return "its manifest is incomplete"
        if sum(self.class_counts) != self.count:
            return f"its classes have {sum(self.class_counts)} records together, its count says {self.count}"
        return ""


def encode(pixels: Pixels, codec: Literal["raw", "jpeg"], parameters: dict[str, int | str] | None = None) -> bytes:
    """The payload of a record; for ``centered`` see :func:`centred.encode_centred`.

    Args:
        pixels: (256, 256, 3) uint8, RGB.
        codec: ``raw`` or ``jpeg``.
        parameters: for jpeg ``quality`` (1..100) and ``subsampling`` ("420", "422", "444"); the default is 90, "420".
    """
    if pixels.shape != SHAPE or pixels.dtype != np.uint8:
        raise ValueError(f"a record is {SHAPE} uint8, not {pixels.shape} {pixels.dtype}")
    if codec == "raw":
        return pixels.tobytes()
    chosen = DEFAULT_PARAMETERS["jpeg"] | (parameters or {})
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=int(chosen["quality"]),
            colorspace="RGB",
            colorsubsampling=str(chosen["subsampling"]),
        )
    )


def decode(payload: bytes | memoryview, codec: int, into: npt.NDArray[np.uint8] | None = None) -> Pixels:
    """The pixels of a payload that needs no mean: (256, 256, 3) uint8, RGB; of ``raw`` a view, not a copy.

    Args:
        payload: a record's, as it is stored.
        codec: of :data:`CODECS`, ``raw`` or ``jpeg``.
        into: (196608,) uint8, where a ``jpeg`` is decoded to; a new array if None.

    Raises:
        ValueError: the payload is not what the codec says.
    """
    if codec == CODECS["raw"]:
        if len(payload) != RAW_BYTES:
            raise ValueError(f"a raw payload has {RAW_BYTES} bytes, this one {len(payload)}")
        return np.frombuffer(payload, np.uint8).reshape(SHAPE)
    if codec == CODECS["jpeg"]:
        try:
            # Into a buffer of this size even where none is given: a JPEG that says it is huge is then refused.
            buffer = np.empty(RAW_BYTES, np.uint8) if into is None else into
            pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=buffer)
        except ValueError as error:
            raise ValueError(f"its JPEG cannot be decoded ({error})") from error
        if pixels.shape != SHAPE:
            raise ValueError(f"the JPEG decodes to {pixels.shape}, not {SHAPE}")
        return pixels
    raise ValueError(f"codec number {codec} is unknown")


class Records:
    """A finished environment, open for reading.

    Opening checks that the file is as long as its tree says and that the manifest is whole; records are checked as they
    are read. Use one instance per process: LMDB environments do not survive a fork.

    Raises:
        DatasetNotFound, DatasetUnfinished, DatasetInvalid: see their sentences.
    """

    def __init__(self, path: Path | str, *, manifest: Manifest | None = None) -> None:
        self.path = Path(path)
        if not (self.path / "data.mdb").is_file():
            raise DatasetNotFound(self.path)
        self._env = _open_environment(self.path)
        try:
            self._records, self._sources, manifest_db = _open_databases(self._env, self.path)
            # A manifest is given only by the writer, which has not stored one yet.
            self.manifest = manifest or _read_manifest(self._env, manifest_db, self.path)
            with self._env.begin() as txn:
                entries = txn.stat(self._records)["entries"]
            if entries != self.manifest.count:
                raise DatasetInvalid(self.path, f"it holds {entries} records, its manifest says {self.manifest.count}")
        except BaseException:
            self._env.close()
            raise
        self.statistics = self.manifest.statistics

    def __len__(self) -> int:
        return self.manifest.count

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment; views of its pages must be gone."""
        self._env.close()

    @cached_property
    def mean_pair(self) -> npt.NDArray[np.float32]:
        """The mean image and its mirror image: (2, 256, 256, 3) float32; a mirrored sample's window is of the second."""
        mean = self.statistics.mean_image
        return np.ascontiguousarray(np.stack((mean, mean[:, ::-1])))

    @cached_property
    def _centre(self) -> npt.NDArray[np.int16] | None:
        """What ``centered`` records lack; None for other codecs."""
        return centre_of(self.statistics.mean_image) if self.manifest.codec == "centered" else None

    @contextmanager
    def values(self) -> Iterator[Values]:
        """A read transaction: the values it gives are views of LMDB's pages and die with it."""
        with self._env.begin(db=self._records, buffers=True) as txn:
            yield Values(self.path, txn, self.manifest.codec, self._centre)

    def pixels(self, number: int) -> tuple[int, Pixels]:
        """Label and pixels, (256, 256, 3) uint8 RGB, of one record; a copy."""
        with self.values() as values:
            label, codec, _, payload = values.read(number)
            return label, values.decode(number, payload, codec).copy()

    def check(self, number: int) -> None:
        """Compare one record with its checksum.

        Raises:
            RecordError: it is missing, damaged, or of a class that does not exist.
        """
        with self.values() as values:
            label, codec, checksum, payload = values.read(number)
            if xxhash.xxh3_64_intdigest(payload) != checksum:
                raise RecordError(self.path, number, "its payload does not match its checksum")
            if label >= len(self.manifest.class_names):
                raise RecordError(self.path, number, f"its label {label} is beyond the last class")
            values.decode(number, payload, codec)

    def source(self, number: int) -> str:
        """The name of the file that a record was made from."""
        with self._env.begin(db=self._sources) as txn:
            name = txn.get(KEY.pack(number))
        if name is None:
            raise RecordError(self.path, number, "it has no source name")
        return bytes(name).decode("utf-8", "replace")

    def headers(self) -> Iterator[bytes]:
        """The 16-byte headers of all records, in order; what the fingerprint is made of."""
        with self._env.begin(db=self._records, buffers=True) as txn, txn.cursor() as cursor:
            for _, value in cursor:
                yield bytes(value[: HEADER.size])


class Values:
    """The records' values within one read transaction."""

    __slots__ = ("_centre", "_codec", "_get", "_path")

    def __init__(self, path: Path, txn: Any, codec: Codec, centre: npt.NDArray[np.int16] | None) -> None:
        self._path, self._get, self._codec, self._centre = path, txn.get, codec, centre

    def stored(self, numbers: npt.NDArray[np.int64], at: npt.NDArray[np.int64] | None = None) -> list[memoryview]:
        """The values of many records, header and payload, as views of LMDB's pages.

        Args:
            numbers: (n,) int64, the records'.
            at: (1,) int64; holds the number that is being looked up: py-lmdb touches every page of a value it finds, so
                this is where a disk that cannot read one kills the process.

        Raises:
            RecordError: there is no such record.
        """
        values: list[memoryview] = []
        for number in numbers.tolist():
            if at is not None:
                at[0] = number
            values.append(self._find(number))
        return values

    def _find(self, number: int) -> memoryview:
        value: memoryview | None = self._get(KEY.pack(number))
        if value is None:
            raise RecordError(self._path, number, "there is no such record")
        return value

    def read(self, number: int) -> Found:
        """Label, codec number, checksum and payload of one record; the payload is a view of LMDB's pages.

        Raises:
            RecordError: there is no such record, or it is too short for a header.
        """
        value = self._find(number)
        if len(value) <= HEADER.size:
            raise RecordError(self._path, number, f"it has {len(value)} bytes, fewer than its header")
        label, codec, checksum = HEADER.unpack_from(value)
        return label, codec, checksum, value[HEADER.size :]

    def decode(self, number: int, payload: memoryview, codec: int, into: npt.NDArray[np.uint8] | None = None) -> Pixels:
        """:func:`decode`, for every codec, with the record named when it fails."""
        try:
            if codec == CODECS["centered"] and self._centre is not None:
                return decode_centred(payload, self._centre, into)
            return decode(payload, codec, into)
        except ValueError as error:
            raise RecordError(self._path, number, str(error)) from error

    def unpack(self, number: int, found: Found, into: npt.NDArray[np.uint8]) -> None:
        """Make the raw record that a record of another codec stands for.

        Args:
            number: the record's.
            found: what :meth:`read` gave for it.
            into: (16 + 196608,) uint8, written with header and pixels; see :func:`raw_value`.

        Raises:
            RecordError: it cannot be decoded, or its codec is not its dataset's.
        """
        label, codec, checksum, payload = found
        if codec != CODECS[self._codec]:
            raise self.foreign(number, codec, self._codec)
        HEADER.pack_into(into.data, 0, label, CODECS["raw"], checksum)
        self.decode(number, payload, codec, into[HEADER.size :])

    def refusal(self, number: int) -> RecordError:
        """Why a record is not a raw one."""
        _, codec, _, payload = self.read(number)
        if codec == CODECS["raw"]:
            self.decode(number, payload, codec)
        return self.foreign(number, codec, "raw")

    def foreign(self, number: int, codec: int, needed: Codec) -> RecordError:
        """The error of a record whose codec is not its dataset's."""
        return RecordError(self._path, number, f"its codec number is {codec}, where the manifest says {needed}")


def raw_value() -> npt.NDArray[np.uint8]:
    """Memory for one raw record, header and payload: (16 + 196608,) uint8.

    Its payload lies 16 bytes beyond a multiple of 32 on purpose: to a buffer that is aligned to 32 bytes libjpeg-turbo
    writes past the caches, which is 8 % slower for pixels that are read at once.
    """
    memory = np.empty(HEADER.size + RAW_BYTES + 32, np.uint8)
    start = -memory.ctypes.data % 32
    return memory[start : start + HEADER.size + RAW_BYTES]


def fingerprint(manifest: Manifest, headers_digest: bytes) -> str:
    """The identity of a dataset: equal fingerprints mean equal samples. 32 hexadecimal digits."""
    digest = xxhash.xxh3_128(b"loader-service dataset 1\n")
    digest.update(
        msgspec.msgpack.encode((manifest.format, manifest.count, manifest.size, manifest.codec, manifest.class_names))
    )
    digest.update(manifest.mean_image)
    numbers = (manifest.channel_means, manifest.covariance, manifest.eigenvalues, manifest.eigenvectors)
    digest.update(msgspec.msgpack.encode(numbers))
    digest.update(headers_digest)
    return digest.hexdigest()


def digest_headers(headers: Iterator[bytes] | Sequence[bytes]) -> bytes:
    """The digest of all record headers that :func:`fingerprint` takes."""
    digest = xxhash.xxh3_128()
    for header in headers:
        digest.update(header)
    return digest.digest()


def _open_environment(path: Path) -> Any:
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(DATABASES), create=False)
    except lmdb.Error as error:
        raise DatasetInvalid(path, f"LMDB cannot open it ({error})") from error
    need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    have = (path / "data.mdb").stat().st_size
    if have < need:  # reading past the end of a mapped file is a SIGBUS, not an error
        env.close()
        raise DatasetInvalid(path, f"data.mdb is truncated: it has {have} bytes of {need}")
    return env


def _open_databases(env: Any, path: Path) -> list[Any]:
    try:
        return [env.open_db(name, create=False) for name in DATABASES]
    except lmdb.NotFoundError as error:
        raise DatasetUnfinished(path) from error
    except lmdb.Error as error:
        raise DatasetInvalid(path, f"LMDB cannot read it ({error})") from error


def _read_manifest(env: Any, database: Any, path: Path) -> Manifest:
    with env.begin(db=database) as txn:
        data = txn.get(b"manifest")
    if data is None:
        raise DatasetUnfinished(path)
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DatasetInvalid(path, f"its manifest cannot be read ({error})") from error
    if flaw := manifest.flaw():
        raise DatasetInvalid(path, flaw)
    return manifest
