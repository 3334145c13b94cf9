"""Writing an environment: beside its final name, and under it only when it is whole."""

from __future__ import annotations

import os
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

from loader_service.data.fill import golden
from loader_service.data.records import (
    CODECS,
    DATABASES,
    DEFAULT_PARAMETERS,
    FORMAT,
    HEADER,
    KEY,
    Codec,
    Manifest,
    Records,
    Rejected,
    Statistics,
    fingerprint,
)
from loader_service.errors import DatasetInvalid
from loader_service.spec import RECORD_SIDE_PX

_MAP_BYTES: Final = 2**42
"""Largest environment, 4 TiB: address space only, the file grows as it is written."""

_COMMIT_RECORDS: Final = 256
"""Records per transaction: 48 MiB of raw pixels, so that memory stays flat."""


class Writer:
    """Writes one environment, record by record, and puts it under its name when it is finished.

    Until :meth:`finish` the environment lies beside ``path`` under a hidden name; leaving the block without having
    finished removes it. A finished environment that stood under the name before is replaced: whoever has it open goes
    on reading the old one.

    Args:
        path: the environment's final name.
        codec: ``raw`` or ``jpeg``; what the payloads given to :meth:`put` are.
        codec_parameters: as for :func:`records.encode`.
        class_names: by label.

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
    ) -> None:
        self.path = Path(path)
        self._codec: Codec = codec
        self._parameters = DEFAULT_PARAMETERS[codec] | dict(codec_parameters or {})
        self._class_names = tuple(class_names)
        self._class_counts = [0] * len(self._class_names)
        self._headers = xxhash.xxh3_128()
        self._count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._finished = False
        try:
            self._env = _open_for_writing(self._partial)
            self._records, self._sources, _ = (self._env.open_db(name) for name in DATABASES)
            self._txn = self._env.begin(write=True)
        except lmdb.Error as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise DatasetInvalid(self.path, f"LMDB cannot create it ({error})") from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._finished:
            self._env.close()  # aborts the open transaction
            shutil.rmtree(self._partial)

    def __len__(self) -> int:
        return self._count

    def put(self, label: int, payload: bytes | memoryview, source: str) -> int:
        """Append a record and return its number.

        Args:
            label: 0 .. number of classes - 1.
            payload: what :func:`records.encode` made.
            source: the name of the file that it was made from.
        """
        header = HEADER.pack(label, CODECS[self._codec], xxhash.xxh3_64_intdigest(payload))
        key = KEY.pack(self._count)
        try:
            self._txn.put(key, b"".join((header, payload)), db=self._records, append=True)
            self._txn.put(key, source.encode("utf-8", "replace"), db=self._sources, append=True)
            self._class_counts[label] += 1
            self._count += 1
            if self._count % _COMMIT_RECORDS == 0:
                self._txn.commit()
                self._txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise DatasetInvalid(self.path, f"LMDB cannot write record {self._count} ({error})") from error
        self._headers.update(header)
        return self._count - 1

    def finish(
        self, statistics: Statistics, *, made_by: Mapping[str, str], rejected: Sequence[Rejected] = ()
    ) -> Manifest:
        """Write the manifest, flush everything to the disk, and give the environment its name.

        Args:
            statistics: the training split's, also for a validation split.
            made_by: how and with which libraries the records were made.
            rejected: sources that became no record.
        """
        try:
            self._txn.commit()
            manifest = self._describe(statistics, made_by, rejected)
            self._env.sync(True)
            self._env.close()  # LMDB allows one handle per process, and the golden samples need a reader
            with Records(self._partial, manifest=manifest) as records:
                manifest = msgspec.structs.replace(manifest, golden=golden(records))
            self._env = _open_for_writing(self._partial)
            with self._env.begin(write=True, db=self._env.open_db(b"manifest")) as txn:
                txn.put(b"manifest", msgspec.msgpack.encode(manifest))
            self._env.sync(True)
        except lmdb.Error as error:
            raise DatasetInvalid(self.path, f"LMDB cannot finish it ({error})") from error
        self._env.close()
        (self._partial / "lock.mdb").unlink(missing_ok=True)
        self._finished = True
        _replace(self._partial, self.path)
        return manifest

    def _describe(self, statistics: Statistics, made_by: Mapping[str, str], rejected: Sequence[Rejected]) -> Manifest:
        def numbers(array: npt.NDArray[Any]) -> tuple[float, ...]:
            return tuple(float(v) for v in array.ravel())

        manifest = Manifest(
            format=FORMAT,
            count=self._count,
            size=RECORD_SIDE_PX,
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
            rejected=tuple(rejected),
            fingerprint="",
            golden="",
        )
        if self._count == 0:
            raise DatasetInvalid(self.path, "no source became a record, so there is nothing to write")
        if flaw := manifest.flaw():
            raise DatasetInvalid(self.path, flaw)
        return msgspec.structs.replace(manifest, fingerprint=fingerprint(manifest, self._headers.digest()))


def _open_for_writing(path: Path) -> Any:
    return lmdb.open(
        str(path), map_size=_MAP_BYTES, max_dbs=len(DATABASES), sync=False, metasync=False, readahead=False
    )


def _replace(partial: Path, path: Path) -> None:
    """Put a directory under a name that may be taken: rename cannot replace a directory that is not empty."""
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
