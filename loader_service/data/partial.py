"""How far an unfinished environment is: a sub-database that its writer keeps beside the records, in their transactions.

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

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec
import numpy as np
import xxhash

from loader_service.data.codecs import HEADER
from loader_service.data.manifest import MAX_CLASSES, Rejected
from loader_service.data.records import KEY, Records
from loader_service.errors import DatasetError

PROGRESS: Final = b"progress"
_IDENTITY: Final = re.compile(r"[0-9a-f]{16,64}")
_STATE: Final = b"state"
_HEADER_DTYPE: Final = np.dtype({"names": ["label"], "formats": ["<u4"], "itemsize": HEADER.size})


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
        done = load(partial, MAX_CLASSES)
        return done.count if done else 0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one commit added: the headers of its records, one after another, and what was rejected meanwhile."""

    headers: bytes
    rejected: list[Rejected]


class Progress:
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


def store(txn: Any, progress: Any, headers: bytes, rejected: Sequence[Rejected], state: bytes) -> None:
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


def load(path: Path, classes: int) -> Progress | None:
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
        done = Progress(classes)
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
