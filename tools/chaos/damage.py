"""Copies of a dataset with damaged records, as a failing disk leaves them.

Damage is written while no node has the file open: LMDB's pages would change under a reader, which no disk does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Final

import lmdb

from loader_service.data.codecs import HEADER
from loader_service.data.records import DATABASES, KEY, Records

SPLIT: Final = "train.lmdb"
"""The split that the clients read; the only one that is copied."""

MAP_BYTES: Final = 2**40
"""Largest environment: address space, not memory. LMDB writes changed pages to new places, so the file grows."""


def count(data: Path) -> int:
    """Return the number of records of a dataset."""
    with Records(data / SPLIT) as records:
        return len(records)


def copy(data: Path, to: Path) -> None:
    """Copy a dataset's split to the folder ``to``, in place of an earlier copy."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(data / SPLIT, to / SPLIT)


def flip_bits(data: Path, numbers: Iterable[int], rng: Random) -> None:
    """Flip one random bit in the payload of each of these records."""

    def flip(payload: bytes) -> bytes:
        bit = rng.randrange(8 * len(payload))
        flipped = payload[bit // 8] ^ 1 << bit % 8
        return b"".join((payload[: bit // 8], bytes([flipped]), payload[bit // 8 + 1 :]))

    _rewrite(data, numbers, flip)


def erase(data: Path) -> None:
    """Overwrite every payload with zeros: the disk's directory is there, its content is gone."""
    _rewrite(data, range(count(data)), lambda payload: bytes(len(payload)))


def _rewrite(data: Path, numbers: Iterable[int], change: Callable[[bytes], bytes]) -> None:
    """Replace the payloads of records; their headers, with the checksums, stay."""
    with (
        lmdb.open(str(data / SPLIT), map_size=MAP_BYTES, max_dbs=len(DATABASES), lock=False) as env,
        env.begin(write=True, db=env.open_db(DATABASES[0])) as txn,
    ):
        for number in numbers:
            value = txn.get(KEY.pack(number))
            assert value is not None, "records are numbered from 0 without gaps"
            txn.put(KEY.pack(number), value[: HEADER.size] + change(value[HEADER.size :]))
