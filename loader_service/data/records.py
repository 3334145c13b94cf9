"""The LMDB environment of one split: its records, their source names and its manifest.

Layout (format 1). An environment is a directory with LMDB's ``data.mdb`` and three named sub-databases:

======== =========================== =====================================================================
database key                         value
======== =========================== =====================================================================
records  record number, 8 bytes BE   HEADER (label, codec, seal, xxh3-64 of the payload), then the payload
sources  record number, 8 bytes BE   the source's name, UTF-8
manifest ``manifest``                :class:`Manifest` as MessagePack; written last, so none means unfinished
======== =========================== =====================================================================

See :mod:`codecs` for the payloads and :mod:`checksums` for the seal. Environments are opened without LMDB's lock file: a
finished environment never changes, so readers need no locks, and read-only mounts work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt

from loader_service.data.checksums import Checked, matches, unsealed
from loader_service.data.codecs import CODECS, HEADER, Codec, Pixels, centre_of, decode, decode_centred
from loader_service.data.kernel import Window
from loader_service.data.manifest import Manifest
from loader_service.data.readahead import ReadAhead
from loader_service.errors import DatasetInvalid, DatasetNotFound, DatasetUnfinished, RecordError

KEY: Final = struct.Struct(">Q")  # big-endian: LMDB compares keys as bytes, and so sorts them by number
DATABASES: Final = (b"records", b"sources", b"manifest")  # callers unpack them in this order

StoredRecord = tuple[int, int, int, memoryview]
"""A stored record: label, codec number, checksum of the payload, payload."""


class Records:
    """A finished environment, open for reading.

    Opening checks that the file is as long as its tree needs and that the manifest is complete. Records are compared with
    their checksums when they are read. Use one instance per process: an LMDB environment must not be used after a fork.

    Args:
        path: directory of the environment.
        manifest: given by the writer only, which has not stored one yet; None reads the stored manifest.
        checked: the raw records that :meth:`Values.compare_once` need not compare again, shared with other processes that
            serve this environment; None if there are no others.

    Raises:
        DatasetNotFound: there is no environment at ``path``.
        DatasetUnfinished: it has no manifest.
        DatasetInvalid: it is damaged, or of another format.
    """

    def __init__(self, path: Path | str, *, manifest: Manifest | None = None, checked: Checked | None = None) -> None:
        self.path = Path(path)
        if not (self.path / "data.mdb").is_file():
            raise DatasetNotFound(self.path)
        self._env = _open_environment(self.path)
        try:
            self._records, self._sources, manifest_db = _open_databases(self._env, self.path)
            self.manifest = manifest or _read_manifest(self._env, manifest_db, self.path)
            with self._env.begin() as txn:
                entries = txn.stat(self._records)["entries"]
                database = bytes(txn.get(DATABASES[0]))  # LMDB stores a sub-database's root in the main one
            self._checked = checked or Checked(self.manifest.count)
            if entries != self.manifest.count:
                raise DatasetInvalid(self.path, f"it holds {entries} records, its manifest says {self.manifest.count}")
            # LMDB keeps the page size of the machine that wrote the file.
            self.ahead = ReadAhead(self.path / "data.mdb", database, self._env.stat()["psize"])
        except BaseException:
            self._env.close()  # py-lmdb refuses to open a path that this process has open
            raise
        self.statistics = self.manifest.statistics

    def __len__(self) -> int:
        return self.manifest.count

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment; no views of its pages may remain, because closing unmaps them."""
        self.ahead.close()
        self._env.close()

    @property
    def side(self) -> int:
        """Width and height of the records, in pixels."""
        return self.manifest.size

    @cached_property
    def mean_pair(self) -> npt.NDArray[np.float32]:
        """The mean image and its mirror image, (2, side, side, 3) float32; mirrored samples take their window of the second."""
        mean = self.statistics.mean_image
        return np.ascontiguousarray(np.stack((mean, mean[:, ::-1])))

    @cached_property
    def _centre(self) -> npt.NDArray[np.int16] | None:
        """The mean image that ``centered`` records lack, (side, side, 3) int16; None for other codecs."""
        return centre_of(self.statistics.mean_image) if self.manifest.codec == "centered" else None

    @contextmanager
    def values(self) -> Iterator[Values]:
        """Open a read transaction; its values are views of LMDB's pages, valid until it ends."""
        with self._env.begin(db=self._records, buffers=True) as txn:  # buffers: memoryviews of pages, no copies
            yield Values(self.path, txn, self.manifest, self._centre, self._checked)

    def pixels(self, number: int) -> tuple[int, Pixels]:
        """Return label and pixels of one record: int, and (side, side, 3) uint8 RGB, a copy.

        Raises:
            RecordError: it is missing, damaged, or cannot be decoded.
        """
        with self.values() as values:
            label, codec, _, payload = values.read(number)
            return label, values.decode(number, payload, codec).copy()  # views end with the transaction

    def check(self, number: int) -> None:
        """Check one record's checksums and label, and that it can be decoded.

        Raises:
            RecordError: it is missing, damaged, or of a class that does not exist.
        """
        with self.values() as values:
            label, codec, _, payload = values.read(number)
            if label >= len(self.manifest.class_names):
                raise RecordError(self.path, number, f"its label {label} is beyond the last class")
            values.decode(number, payload, codec)

    def source(self, number: int) -> str:
        """Return the name of the file that a record was made from.

        Raises:
            RecordError: the environment holds none.
        """
        with self._env.begin(db=self._sources) as txn:
            name = txn.get(KEY.pack(number))
        if name is None:
            raise RecordError(self.path, number, "it has no source name")
        return bytes(name).decode("utf-8", "replace")

    def headers(self) -> Iterator[bytes]:
        """Iterate over the 16-byte headers of all records, without seals, in order; the fingerprint is made from them."""
        with self._env.begin(db=self._records, buffers=True) as txn, txn.cursor() as cursor:
            for _, value in cursor:
                yield unsealed(value)


class Values:
    """The records of an environment within one read transaction."""

    __slots__ = ("_centre", "_checked", "_codec", "_get", "_path", "_side")

    def __init__(
        self, path: Path, txn: Any, manifest: Manifest, centre: npt.NDArray[np.int16] | None, checked: Checked
    ) -> None:
        self._path, self._get, self._centre = path, txn.get, centre  # txn.get once: it is called for every record
        self._checked = checked
        self._codec, self._side = manifest.codec, manifest.size

    def stored(self, numbers: npt.NDArray[np.int64], at: npt.NDArray[np.int64] | None = None) -> list[memoryview]:
        """Return the values of many records, header and payload, as views of LMDB's pages.

        Args:
            numbers: (n,) int64, the record numbers.
            at: (1,) int64, set to each number before it is looked up. py-lmdb touches every page of a value it finds, so
                a page that the disk cannot read kills the process (SIGBUS) here.

        Raises:
            RecordError: there is no such record.
        """
        values: list[memoryview] = []
        for number in numbers.tolist():
            if at is not None:
                at[0] = number
            values.append(self.find(number))
        return values

    def unchecked(self, numbers: npt.NDArray[np.int64]) -> list[int]:
        """Return the indices of the records in ``numbers``, (n,) int64, that :meth:`compare_once` has not compared yet."""
        return self._checked.missing(numbers)

    def compare_once(
        self,
        numbers: npt.NDArray[np.int64],
        values: list[memoryview],
        unchecked: list[int],
        at: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Compare records with their checksums, and note those that match.

        To compare a raw record takes as long as to make a sample of it. So a node compares each raw record once.

        Args:
            numbers: (n,) int64, the record numbers.
            values: their values, from :meth:`stored`.
            unchecked: indices of the records to compare.
            at: (1,) int64, set to each number before it is compared.

        Raises:
            RecordError: a record is damaged.
        """
        for i in unchecked:
            number = int(numbers[i])
            if at is not None:
                at[0] = number
            self.compare(number, values[i])
            self._checked.add(number)

    def find(self, number: int) -> memoryview:
        """Return the value of a record, header and payload, as a view of LMDB's pages; compare nothing.

        Raises:
            RecordError: there is no such record.
        """
        value: memoryview | None = self._get(KEY.pack(number))
        if value is None:
            raise RecordError(self._path, number, "there is no such record")
        return value

    def compare(self, number: int, value: memoryview) -> StoredRecord:
        """Compare a record with its checksums, and return its parts.

        Args:
            number: record number.
            value: its value, from :meth:`find`.

        Raises:
            RecordError: it is too short for a header, or damaged.
        """
        parts = self._parts(number, value)
        if not matches(number, value, parts[-1]):
            raise self._damaged(number)
        return parts

    def _damaged(self, number: int) -> RecordError:
        return RecordError(
            self._path,
            number,
            "it is damaged: its checksum does not match; `loader-service verify` names all damaged records, and "
            "preprocessing the images again replaces them",
        )

    def _parts(self, number: int, value: memoryview) -> StoredRecord:
        if len(value) <= HEADER.size:  # <=: no payload is empty
            raise RecordError(self._path, number, f"it has {len(value)} bytes, fewer than its header")
        return *HEADER.unpack_from(value), value[HEADER.size :]

    def read(self, number: int) -> StoredRecord:
        """Return the parts of a record that matches its checksums; the payload is a view of LMDB's pages.

        Raises:
            RecordError: there is no such record, or it is damaged.
        """
        return self.compare(number, self.find(number))

    def decode(
        self,
        number: int,
        payload: memoryview,
        codec: int,
        into: npt.NDArray[np.uint8] | None = None,
        window: Window | None = None,
    ) -> Pixels:
        """Decode a payload of any codec, as :func:`codecs.decode` does; RecordError names the record if that fails."""
        try:
            # Without _centre the dataset has another codec: decode() then refuses the number.
            if codec == CODECS["centered"] and self._centre is not None:
                return decode_centred(payload, self._centre, into)
            return decode(payload, codec, into, side=self._side, window=window)
        except ValueError as error:
            raise RecordError(self._path, number, str(error)) from error

    def unpack(self, number: int, value: memoryview, into: npt.NDArray[np.uint8], window: Window | None = None) -> None:
        """Decode a record into a raw record, header and pixels, and compare it with its checksums.

        Args:
            number: record number.
            value: its value, from :meth:`find`.
            into: output, (16 + raw_bytes(side),) uint8; see :func:`codecs.raw_value`.
            window: the part of the pixels that is needed (see :func:`codecs.decode`); None for all.

        Raises:
            RecordError: the record is damaged, cannot be decoded, or its codec is not the dataset's.
        """
        # Decoded first: the payload is then in the CPU's caches.
        try:
            label, codec, checksum, payload = self._parts(number, value)
            if codec != CODECS[self._codec]:
                raise self.foreign(number, codec, self._codec)
            HEADER.pack_into(into.data, 0, label, CODECS["raw"], checksum)
            self.decode(number, payload, codec, into[HEADER.size :], window)
        except RecordError:
            self.compare(number, value)  # if it is damaged, that is the reason
            raise
        if not matches(number, value, payload):
            raise self._damaged(number)

    def refusal(self, number: int) -> RecordError:
        """Return the error that says why a record is not a sound raw record."""
        _, codec, _, payload = self.read(number)
        if codec == CODECS["raw"]:
            self.decode(number, payload, codec)  # raises: the payload has another size
        return self.foreign(number, codec, "raw")

    def foreign(self, number: int, codec: int, needed: Codec) -> RecordError:
        """Return the error of a record whose codec is not the dataset's."""
        return RecordError(self._path, number, f"its codec number is {codec}, but the manifest says {needed}")


def _open_environment(path: Path) -> Any:
    try:
        # lock=False: no lock file and no table of readers, so nothing is written to the directory.
        env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(DATABASES), create=False)
    except lmdb.Error as error:
        raise DatasetInvalid(path, f"LMDB cannot open it ({error})") from error
    need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    have = (path / "data.mdb").stat().st_size
    if have < need:  # reading past the end of a mapped file is a SIGBUS, which kills the process
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
    if data is None:  # the writer creates the database at its start, and this entry at its end
        raise DatasetUnfinished(path)
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DatasetInvalid(path, f"its manifest cannot be read ({error})") from error
    if flaw := manifest.flaw():
        raise DatasetInvalid(path, flaw)
    return manifest
