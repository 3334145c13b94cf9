"""Writing an environment: beside its final name, and under it only when it is whole.

How far an unfinished environment is, its writer keeps in a sub-database beside the records, in their transactions:

======== ============================= ==========================================================================
database key                           value
======== ============================= ==========================================================================
progress number of the step, 8 bytes   :class:`Step` as MessagePack: what one commit added
progress ``state``                     the caller's bytes, as of the last commit
======== ============================= ==========================================================================

A step repeats its records' 16-byte headers, so that to go on takes a glance at a few pages and no pass over the records.
The sub-database is emptied in the transaction that writes the manifest.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from loader_service.data import golden
from loader_service.data.codecs import CODECS, DEFAULT_PARAMETERS, HEADER, Codec, header
from loader_service.data.manifest import FORMAT, MAX_CLASSES, Manifest, Rejected, Statistics, fingerprint
from loader_service.data.records import DATABASES, KEY, Records
from loader_service.errors import DatasetError, DatasetInvalid

_MAP_BYTES: Final = 2**42
"""Largest environment, 4 TiB: address space only, the file grows as it is written."""

_COMMIT_RECORDS: Final = 256
"""Records per transaction of a writer that nobody else commits: 48 MiB of raw pixels, so that memory stays flat."""

PROGRESS: Final = b"progress"
_IDENTITY: Final = re.compile(r"[0-9a-f]{16,64}")
_STATE: Final = b"state"
_HEADER_DTYPE: Final = np.dtype({"names": ["label"], "formats": ["<u4"], "itemsize": HEADER.size})


class Writer:
    """Writes one environment, record by record, and puts it under its name when it is finished.

    Until :meth:`finish` the environment lies beside ``path`` under a hidden name; leaving the block without having
    finished removes it. A finished environment that stood under the name before is replaced: whoever has it open goes
    on reading the old one.

    A writer with an identity can be interrupted at any moment, by SIGKILL, a full disk or a power cut: what was given to
    it up to the last :meth:`commit` stays, under a name made of the identity, and the next writer with that identity goes
    on from there. It then has ``len(writer)`` records and ``writer.rejected`` already, and ``writer.state`` is what was
    last committed with them. Only one process at a time may write under one identity; the caller sees to that.

    Args:
        path: the environment's final name.
        codec: of :data:`codecs.CODECS`; what the payloads given to :meth:`put` are.
        codec_parameters: as for :func:`codecs.encode`.
        class_names: by label.
        identity: 16 to 64 hexadecimal digits that stand for everything that decides the records, the other arguments
            included; None if what is left unfinished is of no use.

    Raises:
        DatasetInvalid: LMDB cannot write, for instance because the disk is full.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        codec: Codec,
        class_names: Sequence[str],
        codec_parameters: Mapping[str, int | str] | None = None,
        identity: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._codec: Codec = codec
        self._parameters = DEFAULT_PARAMETERS[codec] | dict(codec_parameters or {})
        self._class_names = tuple(class_names)
        self._identity = identity
        self._partial = partial_path(self.path, identity or secrets.token_hex(8))
        self._committed_count = 0
        self._finished = False

    def _open(self) -> None:
        """Open the partial environment; one that is there but damaged is begun anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = _load_committed(self._partial, len(self._class_names)) if self._partial.exists() else None
        if done is None and self._partial.exists():
            shutil.rmtree(self._partial)
        done = done or Committed(len(self._class_names))
        self.state, self.rejected = done.state, done.rejected
        self._count, self._class_counts, self._digest = done.count, done.class_counts, done.headers
        self._committed_count = done.count
        self._new_headers: list[bytes] = []
        self._new_rejected: list[Rejected] = []
        self.uncommitted_bytes = 0
        self._env = _open_for_writing(self._partial, durable=self._identity is not None)
        try:
            self._records, self._sources, _, self._progress = map(self._env.open_db, (*DATABASES, PROGRESS))
            self._txn = self._env.begin(write=True)
        except lmdb.Error:
            self._env.close()
            raise

    def __enter__(self) -> Writer:
        was_there = self._partial.exists()
        try:
            self._open()
        except BaseException as error:  # signals too: nobody else cleans up where the block has not been entered
            if not was_there:
                self._remove()
            if isinstance(error, lmdb.Error):
                raise DatasetInvalid(self.path, f"LMDB cannot create it ({error})") from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._finished:
            self._env.close()  # aborts the open transaction
            self._remove()

    def _remove(self) -> None:
        """Remove what is of no use to anybody."""
        if not self.kept:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __len__(self) -> int:
        return self._count

    @property
    def kept(self) -> bool:
        """Whether records would stay, for a writer with the same identity, if this one ended now."""
        return self._identity is not None and self._committed_count > 0

    def put(self, label: int, payload: bytes | memoryview, source: str) -> int:
        """Append a record and return its number.

        Args:
            label: 0 .. number of classes - 1.
            payload: what :func:`codecs.encode` made.
            source: the name of the file that it was made from.
        """
        return self.put_record(b"".join((header(label, self._codec, payload), payload)), source)

    def put_record(self, record: bytes | memoryview, source: str) -> int:
        """The same for a record that has its :func:`codecs.header` already."""
        label, codec, _ = HEADER.unpack_from(record)
        if codec != CODECS[self._codec]:
            raise ValueError(f"records here are {self._codec}; this one is of the codec number {codec}")
        key = KEY.pack(self._count)
        try:
            self._txn.put(key, record, db=self._records, append=True)
            self._txn.put(key, source.encode("utf-8", "replace"), db=self._sources, append=True)
        except lmdb.Error as error:
            raise self._failed(f"cannot write record {self._count}", error) from error
        self._class_counts[label] += 1
        self._count += 1
        stored_header = bytes(record[: HEADER.size])
        self._digest.update(stored_header)
        self._new_headers.append(stored_header)
        self.uncommitted_bytes += len(record)
        if self._identity is None and self._count % _COMMIT_RECORDS == 0:
            self.commit()
        return self._count - 1

    def reject(self, source: str, reason: str) -> None:
        """Note a source that became no record, and why."""
        bad = Rejected(source, reason)
        self.rejected.append(bad)
        self._new_rejected.append(bad)

    def commit(self, state: bytes = b"") -> None:
        """Make everything so far survive this process; with an identity, also the machine.

        Args:
            state: what the caller needs to go on from here, instead of what it committed before.
        """
        try:
            if self._identity is not None:
                _store_step(self._txn, self._progress, b"".join(self._new_headers), self._new_rejected, state)
            self._txn.commit()
            self._txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise self._failed(f"cannot commit record {self._count}", error) from error
        self.state = state
        self._committed_count = self._count
        self._new_headers.clear()
        self._new_rejected.clear()
        self.uncommitted_bytes = 0

    def _failed(self, what: str, error: lmdb.Error) -> DatasetInvalid:
        kept = f"; its first {self._committed_count:,} records are kept, to go on from" if self.kept else ""
        return DatasetInvalid(self.path, f"LMDB {what} ({error}){kept}")

    def finish(self, statistics: Statistics, *, made_by: Mapping[str, str]) -> Manifest:
        """Write the manifest, flush everything to the disk, and give the environment its name.

        Args:
            statistics: the training split's, also for a validation split; as wide as their mean image are the records.
            made_by: how and with which libraries the records were made.
        """
        self.commit(self.state)
        try:
            self._txn.abort()
            manifest = self._describe(statistics, made_by)
            self._env.sync(True)
            self._env.close()  # LMDB allows one handle per process, and the golden samples need a reader
            with Records(self._partial, manifest=manifest) as records:
                manifest = msgspec.structs.replace(manifest, golden=golden.of_dataset(records))
            self._env = _open_for_writing(self._partial, durable=self._identity is not None)
            manifest_db, progress = self._env.open_db(b"manifest"), self._env.open_db(PROGRESS)
            with self._env.begin(write=True) as txn:  # from here on it is whole, and nothing to go on from
                txn.put(b"manifest", msgspec.msgpack.encode(manifest), db=manifest_db)
                txn.drop(progress)
            self._env.sync(True)
        except lmdb.Error as error:
            raise self._failed("cannot finish it", error) from error
        self._env.close()
        self._finished = True
        _publish(self._partial, self.path)
        return manifest

    def _describe(self, statistics: Statistics, made_by: Mapping[str, str]) -> Manifest:
        def numbers(array: npt.NDArray[Any]) -> tuple[float, ...]:
            return tuple(float(v) for v in array.ravel())

        manifest = Manifest(
            format=FORMAT,
            count=self._count,
            size=statistics.side,
            codec=self._codec,
            codec_parameters=self._parameters,
            class_names=self._class_names,
            class_counts=tuple(self._class_counts),
            mean_image=np.ascontiguousarray(statistics.mean_image, "<f4").tobytes(),
            channel_means=numbers(statistics.channel_means),
            covariance=numbers(statistics.covariance),
            eigenvalues=numbers(statistics.eigenvalues),
            eigenvectors=numbers(statistics.eigenvectors),
            made_by=dict(made_by),
            rejected=tuple(self.rejected),
            fingerprint="",
            golden="",
        )
        if self._count == 0:
            raise DatasetInvalid(self.path, "no source became a record, so there is nothing to write")
        if flaw := manifest.flaw():
            raise DatasetInvalid(self.path, flaw)
        return msgspec.structs.replace(manifest, fingerprint=fingerprint(manifest, self._digest.digest()))


def adopt(path: Path, identity: str) -> Manifest | None:
    """Put an environment under its name whose writer had finished it, but died before it could do that itself.

    Args:
        path: the environment's final name.
        identity: the writer's.

    Returns:
        Its manifest; None if there is no such environment.
    """
    partial = partial_path(path, identity)
    try:
        with Records(partial) as records:
            manifest = records.manifest
    except DatasetError:
        return None
    _publish(partial, path)
    return manifest


def _open_for_writing(path: Path, *, durable: bool) -> Any:
    return lmdb.open(
        str(path), map_size=_MAP_BYTES, max_dbs=len(DATABASES) + 1, sync=durable, metasync=durable, readahead=False
    )


def _publish(partial: Path, path: Path) -> None:
    """Put a whole environment under a name that may be taken: rename cannot replace a directory that is not empty."""
    (partial / "lock.mdb").unlink(missing_ok=True)
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if old.exists():
        shutil.rmtree(old)


def partial_path(path: Path, identity: str) -> Path:
    """Where the environment of an identity lies until it is finished: hidden, beside its final name."""
    if not _IDENTITY.fullmatch(identity):
        raise ValueError(f"a writer's identity is 16 to 64 hexadecimal digits, not {identity!r}")
    return path.with_name(f".{path.name}.{identity}.partial")


def partials(path: Path) -> dict[Path, int]:
    """All unfinished environments of a final name, and how many records each has to go on from."""
    return {partial: _kept(partial) for partial in path.parent.glob(f".{path.name}.*.partial")}


def _kept(partial: Path) -> int:
    try:
        with Records(partial) as records:  # whole: it lacks its name only
            return len(records)
    except DatasetError:
        done = _load_committed(partial, MAX_CLASSES)
        return done.count if done else 0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one commit added: the headers of its records, one after another, and what was rejected meanwhile."""

    headers: bytes
    rejected: list[Rejected]


class Committed:
    """What all steps add up to.

    Fields:
        count: number of records.
        class_counts: of them, by label.
        headers: digest of their headers.
        rejected: what became no record, in order.
        state: the caller's.
    """

    def __init__(self, classes: int) -> None:
        self.count = 0
        self.class_counts = [0] * classes
        self.headers = xxhash.xxh3_128()
        self.rejected: list[Rejected] = []
        self.state = b""

    def add(self, step: Step) -> None:
        """Take a step in.

        Raises:
            ValueError: its headers are no headers.
        """
        labels = np.frombuffer(step.headers, _HEADER_DTYPE)["label"]
        counts = np.bincount(labels, minlength=len(self.class_counts))
        if len(counts) > len(self.class_counts):
            raise ValueError(f"a label is beyond the last of {len(self.class_counts)} classes")
        self.class_counts = (np.array(self.class_counts, np.int64) + counts).tolist()
        self.count += len(labels)
        self.headers.update(step.headers)
        self.rejected += step.rejected


def _store_step(txn: Any, progress: Any, headers: bytes, rejected: Sequence[Rejected], state: bytes) -> None:
    """Add a step to the transaction that holds its records.

    Args:
        txn: a write transaction.
        progress: the sub-database.
        headers: the step's.
        rejected: the step's.
        state: replaces the last step's.
    """
    if headers or rejected:
        entries = txn.stat(progress)["entries"]
        number = max(0, entries - 1)  # all entries but the state are steps
        txn.put(KEY.pack(number), msgspec.msgpack.encode(Step(headers, list(rejected))), db=progress)
    txn.put(_STATE, state, db=progress)


def _load_committed(path: Path, classes: int) -> Committed | None:
    """What an unfinished environment holds; None if it is damaged or has nothing to go on from.

    Args:
        path: its directory.
        classes: how many classes its labels may name.
    """
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=3, create=False)
    except lmdb.Error:
        return None
    try:
        need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (path / "data.mdb").stat().st_size < need:  # reading past the end of a mapped file is a SIGBUS
            return None
        records, sources, progress = (env.open_db(name, create=False) for name in (b"records", b"sources", PROGRESS))
        done = Committed(classes)
        with env.begin() as txn:
            for key, value in txn.cursor(progress):
                if key == _STATE:
                    done.state = bytes(value)
                else:
                    done.add(msgspec.msgpack.decode(value, type=Step))
            whole = txn.stat(records)["entries"] == txn.stat(sources)["entries"] == done.count
    except (lmdb.Error, msgspec.MsgspecError, ValueError):
        return None
    finally:
        env.close()
    return done if whole and done.count else None
