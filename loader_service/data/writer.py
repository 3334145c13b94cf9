"""The writer of environments: it writes under a hidden name, and renames the environment when it is complete.

The writer keeps its progress in a sub-database of the unfinished environment, in the same transactions as the records:

======== ============================= ==========================================================================
database key                           value
======== ============================= ==========================================================================
progress number of the step, 8 bytes   :class:`Step` as MessagePack: what one commit added
progress ``state``                     the caller's bytes, as of the last commit
======== ============================= ==========================================================================

A step repeats its records' 16-byte headers, without their seals, so resuming reads a few pages instead of all records. The
sub-database is emptied in the transaction that writes the manifest: an environment has either a manifest or progress, never
both.
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
from loader_service.data.checksums import seal, unsealed
from loader_service.data.codecs import CODECS, DEFAULT_PARAMETERS, HEADER, Codec, header
from loader_service.data.manifest import FORMAT, MAX_CLASSES, Manifest, Rejected, Statistics, fingerprint
from loader_service.data.records import DATABASES, KEY, Records
from loader_service.errors import DatasetError, DatasetInvalid

_MAP_BYTES: Final = 2**42
"""Largest environment, 4 TiB: this reserves address space only, the file grows as it is written."""

_COMMIT_RECORDS: Final = 256
"""Records per transaction of a writer without identity: 48 MiB of raw pixels. LMDB keeps a transaction's pages in memory."""

PROGRESS: Final = b"progress"
_IDENTITY: Final = re.compile(r"[0-9a-f]{16,64}")
_STATE: Final = b"state"
# Of each 16-byte header only the label, at offset 0.
_HEADER_DTYPE: Final = np.dtype({"names": ["label"], "formats": ["<u4"], "itemsize": HEADER.size})


class Writer:
    """A context manager that writes one environment, record by record, and gives it its name when it is finished.

    Until :meth:`finish` the environment lies next to ``path`` under a hidden name. Leaving the block without finishing
    removes it. An older environment at ``path`` is replaced; processes that have it open continue to read the old one.

    A writer with an identity can be interrupted at any moment, by SIGKILL, a full disk or a power cut. Everything up to the
    last :meth:`commit` stays, under a name made from the identity, and the next writer with that identity resumes: it has
    ``len(writer)`` records, ``writer.rejected`` and ``writer.state`` as of that commit. Only one process at a time may
    write under one identity; the caller must ensure it.

    Args:
        path: final name of the environment.
        codec: codec of the payloads given to :meth:`put`, one of :data:`codecs.CODECS`.
        codec_parameters: parameters of the codec, as for :func:`codecs.encode`.
        class_names: class names by label.
        identity: 16 to 64 hexadecimal digits, a hash of everything that decides the records, including the other
            arguments; None if an unfinished environment is useless.

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
        self._partial = partial_path(self.path, identity or secrets.token_hex(8))  # random: never resumed
        self._committed_count = 0
        self._finished = False

    def _open(self) -> None:
        """Open the partial environment; replace it by an empty one if it is damaged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Read the progress before the environment is opened for writing: LMDB allows one handle per process.
        done = _load_committed(self._partial, len(self._class_names)) if self._partial.exists() else None
        if done is None and self._partial.exists():
            shutil.rmtree(self._partial)
        done = done or Committed(len(self._class_names))
        self.state, self.rejected = done.state, done.rejected
        self._count, self._class_counts, self._digest = done.count, done.class_counts, done.headers
        self._committed_count = done.count
        # The uncommitted part: the next step of the sub-database PROGRESS.
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
        except BaseException as error:  # signals too: __exit__ is not called if __enter__ fails
            if not was_there:  # else it may hold records that _open() has not counted yet
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
        """Remove the partial environment unless a later writer can resume from it."""
        if not self.kept:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __len__(self) -> int:
        return self._count

    @property
    def kept(self) -> bool:
        """True if committed records stay for a writer with the same identity when this one ends."""
        return self._identity is not None and self._committed_count > 0

    def put(self, label: int, payload: bytes | memoryview, source: str) -> int:
        """Append a record and return its number.

        Args:
            label: 0 .. number of classes - 1.
            payload: encoded pixels, from :func:`codecs.encode` or :func:`codecs.encode_centred`.
            source: name of the file that the record was made from.
        """
        return self.put_record(memoryview(bytearray().join((header(label, self._codec, payload), payload))), source)

    def put_record(self, record: memoryview, source: str) -> int:
        """Append a record, and return its number.

        Args:
            record: a :func:`codecs.header` and its payload, writable: the seal is added in place.
            source: name of the file that the record was made from.
        """
        label, codec, _ = HEADER.unpack_from(record)
        if codec != CODECS[self._codec]:
            raise ValueError(f"this environment holds {self._codec} records; this one has the codec number {codec}")
        key = KEY.pack(self._count)
        seal(self._count, record)
        try:
            # append: keys ascend, so LMDB fills each page instead of splitting it in half.
            self._txn.put(key, record, db=self._records, append=True)
            self._txn.put(key, source.encode("utf-8", "replace"), db=self._sources, append=True)
        # The transaction may lack half of a record now. The caller must leave the block, which aborts it.
        except lmdb.Error as error:
            raise self._failed(f"cannot write record {self._count}", error) from error
        self._class_counts[label] += 1
        self._count += 1
        plain = unsealed(record)  # a copy: `record` may be a view that is overwritten later
        self._digest.update(plain)
        self._new_headers.append(plain)
        self.uncommitted_bytes += len(record)
        # With an identity the caller commits, because each commit needs the caller's state for the same records.
        if self._identity is None and self._count % _COMMIT_RECORDS == 0:
            self.commit()
        return self._count - 1

    def reject(self, source: str, reason: str) -> None:
        """Note a source that became no record, with the reason."""
        bad = Rejected(source, reason)
        self.rejected.append(bad)
        self._new_rejected.append(bad)

    def commit(self, state: bytes = b"") -> None:
        """Commit everything so far: it survives this process and, with an identity, a power cut.

        Args:
            state: bytes that the caller needs to resume from here; they replace those of the last commit.
        """
        try:
            if self._identity is not None:
                _store_step(self._txn, self._progress, b"".join(self._new_headers), self._new_rejected, state)
            self._txn.commit()
            self._txn = self._env.begin(write=True)  # one transaction is always open for put()
        except lmdb.Error as error:
            raise self._failed(f"cannot commit record {self._count}", error) from error
        self.state = state
        self._committed_count = self._count  # only now: `kept` must not promise more than LMDB holds
        self._new_headers.clear()
        self._new_rejected.clear()
        self.uncommitted_bytes = 0

    def _failed(self, what: str, error: lmdb.Error) -> DatasetInvalid:
        kept = f"; its first {self._committed_count:,} records are kept, to resume from" if self.kept else ""
        return DatasetInvalid(self.path, f"LMDB {what} ({error}){kept}")

    def finish(self, statistics: Statistics, *, made_by: Mapping[str, str]) -> Manifest:
        """Write the manifest, flush everything to the disk, and give the environment its name.

        Args:
            statistics: statistics of the training split, also for a validation split; their mean image has the records'
                side.
            made_by: how and with which libraries the records were made.

        Raises:
            DatasetInvalid: there are no records, the manifest would be inconsistent, or LMDB cannot write.
        """
        self.commit(self.state)  # keeps the state, so that a later run can resume if finish() fails
        try:
            self._txn.abort()  # the empty transaction that commit() opened
            manifest = self._describe(statistics, made_by)
            self._env.sync(True)  # commits without an identity have not synced
            self._env.close()  # LMDB allows one handle per process, and the golden samples need a reader
            with Records(self._partial, manifest=manifest) as records:
                manifest = msgspec.structs.replace(manifest, golden=golden.of_dataset(records))
            self._env = _open_for_writing(self._partial, durable=self._identity is not None)
            manifest_db, progress = self._env.open_db(b"manifest"), self._env.open_db(PROGRESS)
            with self._env.begin(write=True) as txn:  # one transaction: complete, and no longer resumable
                txn.put(b"manifest", msgspec.msgpack.encode(manifest), db=manifest_db)
                txn.drop(progress)
            self._env.sync(True)  # the manifest is on the disk before the environment gets its name
        except lmdb.Error as error:
            raise self._failed("cannot finish it", error) from error
        self._env.close()
        self._finished = True  # before _publish(): if it fails, __exit__ must not remove a complete environment
        _publish(self._partial, self.path)
        return manifest

    def _describe(self, statistics: Statistics, made_by: Mapping[str, str]) -> Manifest:
        def numbers(array: npt.NDArray[Any]) -> tuple[float, ...]:
            return tuple(float(v) for v in array.ravel())  # MessagePack stores 64-bit floats: nothing is rounded

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
    """Give a complete environment its name, if its writer died just before it did so.

    Args:
        path: final name of the environment.
        identity: identity of the writer.

    Returns:
        Its manifest; None if there is no such environment.
    """
    partial = partial_path(path, identity)
    try:
        with Records(partial) as records:
            manifest = records.manifest
    except DatasetError:  # not there, or unfinished: a Writer resumes it
        return None
    _publish(partial, path)
    return manifest


def _open_for_writing(path: Path, *, durable: bool) -> Any:
    # Without an identity nothing is resumed after a crash, so the fsync of each commit can be left out.
    return lmdb.open(
        str(path), map_size=_MAP_BYTES, max_dbs=len(DATABASES) + 1, sync=durable, metasync=durable, readahead=False
    )


def _publish(partial: Path, path: Path) -> None:
    """Give a complete environment its name, and remove an older environment of that name.

    rename() cannot replace a directory that is not empty, so the old one moves aside first.
    """
    (partial / "lock.mdb").unlink(missing_ok=True)  # readers of a finished environment take no locks
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    if path.exists():
        path.rename(old)
    # A kill between the two renames leaves no environment at `path`; build._clear() then moves the old one back.
    partial.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the names are on the disk before the old environment is deleted
    finally:
        os.close(descriptor)
    if old.exists():
        shutil.rmtree(old)


def partial_path(path: Path, identity: str) -> Path:
    """Return the hidden name, next to the final one, of an unfinished environment.

    Raises:
        ValueError: the identity is not 16 to 64 hexadecimal digits.
    """
    if not _IDENTITY.fullmatch(identity):
        raise ValueError(f"a writer's identity is 16 to 64 hexadecimal digits, not {identity!r}")
    return path.with_name(f".{path.name}.{identity}.partial")


def partials(path: Path) -> dict[Path, int]:
    """Return all unfinished environments of a final name, and how many committed records each holds."""
    return {partial: _kept(partial) for partial in path.parent.glob(f".{path.name}.*.partial")}


def _kept(partial: Path) -> int:
    try:
        with Records(partial) as records:  # complete, only not renamed yet
            return len(records)
    except DatasetError:
        done = _load_committed(partial, MAX_CLASSES)  # the classes are not known here, only their bound
        return done.count if done else 0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of one commit: the concatenated headers of its records, and the sources rejected since the last one."""

    headers: bytes
    rejected: list[Rejected]


class Committed:
    """The sum of all steps of an unfinished environment.

    Fields:
        count: number of records.
        class_counts: number of records by label.
        headers: digest of all record headers.
        rejected: sources that became no record, in order.
        state: bytes of the caller, as of the last commit.
    """

    def __init__(self, classes: int) -> None:
        self.count = 0
        self.class_counts = [0] * classes
        self.headers = xxhash.xxh3_128()
        self.rejected: list[Rejected] = []
        self.state = b""

    def add(self, step: Step) -> None:
        """Add a step.

        Raises:
            ValueError: its headers are damaged, or have labels beyond the classes.
        """
        # frombuffer() raises ValueError if the length is no multiple of 16.
        labels = np.frombuffer(step.headers, _HEADER_DTYPE)["label"]  # (n,) uint32
        # Before bincount(), which allocates as many counters as the largest label says: up to 32 GiB.
        if labels.size and labels.max() >= len(self.class_counts):
            raise ValueError(f"a label is beyond the last of {len(self.class_counts)} classes")
        counts = np.bincount(labels, minlength=len(self.class_counts))
        self.class_counts = (np.array(self.class_counts, np.int64) + counts).tolist()
        self.count += len(labels)
        self.headers.update(step.headers)
        self.rejected += step.rejected


def _store_step(txn: Any, progress: Any, headers: bytes, rejected: Sequence[Rejected], state: bytes) -> None:
    """Add a step to the transaction that holds its records.

    Args:
        txn: the write transaction.
        progress: the sub-database PROGRESS.
        headers: concatenated headers of the step's records.
        rejected: sources rejected in this step.
        state: bytes of the caller; they replace those of the last step.
    """
    if headers or rejected:
        entries = txn.stat(progress)["entries"]
        number = max(0, entries - 1)  # every entry but the state is a step; the first commit finds no state, hence max
        txn.put(KEY.pack(number), msgspec.msgpack.encode(Step(headers, list(rejected))), db=progress)
    txn.put(_STATE, state, db=progress)


def _load_committed(path: Path, classes: int) -> Committed | None:
    """Return the progress of an unfinished environment; None if it is damaged or empty.

    Args:
        path: directory of the environment.
        classes: number of classes; a label beyond them counts as damage.
    """
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=3, create=False)
    except lmdb.Error:
        return None
    try:
        need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (path / "data.mdb").stat().st_size < need:  # reading past the end of a mapped file kills with SIGBUS
            return None
        records, sources, progress = (env.open_db(name, create=False) for name in (b"records", b"sources", PROGRESS))
        done = Committed(classes)
        with env.begin() as txn:
            # In the order of the keys: steps by number, then b"state", because a step's key starts with a zero byte.
            for key, value in txn.cursor(progress):
                if key == _STATE:
                    done.state = bytes(value)
                else:
                    done.add(msgspec.msgpack.decode(value, type=Step))
            # One transaction writes all three, so unequal counts mean damage.
            whole = txn.stat(records)["entries"] == txn.stat(sources)["entries"] == done.count
    except (lmdb.Error, msgspec.MsgspecError, ValueError):
        return None
    finally:
        env.close()
    return done if whole and done.count else None  # without records there is nothing to resume
