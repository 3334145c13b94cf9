"""Reading ahead: the records of a slice are asked of the disk all at once, before the first of them is looked at.

LMDB reads by touching pages: one record after another, a few pages at a time, each waited for. A disk gives several times
as much if it is asked for many things at a time, and for no more than is wanted. So where reading takes long, the kernel
is told beforehand where each record of a slice lies in the file. It is only told: what is read is read through LMDB, so a
wrong hint costs time and nothing else.

Where a record lies LMDB tells only by touching it. So its tree is walked here, by LMDB's documented page format (version
1 of its data, 64-bit; lmdb.h, mdb.c: MDB_page, MDB_node, MDB_db):

====== ================================================================================================
page   number 8 bytes, 2 unused, flags 2, lower 2, upper 2; then, up to ``lower``, each node's place, 2 each
node   low half of its size or child 2, high half 2, flags (of a branch: the child's top bits) 2, key's size 2; then the key
value  after the key; if it is big, the number of the page that it begins on, after that page's header
====== ================================================================================================
"""

from __future__ import annotations

import os
import struct
import weakref
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

SLOW_S: Final = 20e-6
"""A record that takes longer to read was not in memory: there, LMDB takes 2 us for 22 KB and 5 us for 192 KB."""

SLICES: Final = 64
"""Slices that are read ahead once reading has been slow. Then it is tried without: asking costs 15 us a record."""

_PAGE: Final = struct.Struct("<8x2xHHH")
_NODE: Final = struct.Struct("<HHHH")
_PLACE: Final = struct.Struct("<H")
_NUMBER: Final = struct.Struct("<Q")
_DATABASE: Final = struct.Struct("<IHHQQQQQ")
_BRANCH, _LEAF, _BIG = 1, 2, 1
_DEEPEST: Final = 32  # LMDB's own limit


class ReadAhead:
    """What one process knows about reading one environment.

    Args:
        path: of the environment's data file.
        database: the entry of the records' sub-database, as the main database holds it.
        page_bytes: of the environment.
    """

    def __init__(self, path: Path, database: bytes, page_bytes: int) -> None:
        self.database = database
        self._root = _DATABASE.unpack(database)[-1]
        self._page_bytes = page_bytes
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._file)
        self._left = 1  # the first slice tells whether more is to be asked for

    @property
    def is_wanted(self) -> bool:
        """Whether the next slice is to be asked for: nothing is known yet, or reading has been slow of late."""
        return self._left > 0

    def ask(self, numbers: npt.NDArray[np.int64]) -> None:
        """Ask the disk for many records, and do not wait; nothing if reading is fast anyway.

        Args:
            numbers: (n,) int64, the records'.
        """
        if not self.is_wanted:
            return
        self._left -= 1
        for number in numbers.tolist():
            if place := self.place(number):
                os.posix_fadvise(self._file, *place, os.POSIX_FADV_WILLNEED)

    def learn(self, records: int, seconds: float) -> None:
        """Take into account how long a slice's records took to read."""
        if seconds > SLOW_S * records:
            self._left = SLICES

    def place(self, number: int) -> tuple[int, int] | None:
        """Where in the file a record lies: offset and bytes, in whole pages; None if it cannot be told."""
        key = number.to_bytes(8, "big")
        at = self._root
        try:
            for _ in range(_DEEPEST):
                page = os.pread(self._file, self._page_bytes, at * self._page_bytes)
                flags, lower, _ = _PAGE.unpack_from(page)
                low, high, node_flags, key_bytes, begin = self._node(page, (lower - _PAGE.size) // 2, key)
                if flags & _BRANCH:
                    at = low | high << 16 | node_flags << 32
                    continue
                if not flags & _LEAF or page[begin : begin + key_bytes] != key or not node_flags & _BIG:
                    return None  # no such record, or one that is smaller than a page and is here already
                (first,) = _NUMBER.unpack_from(page, begin + key_bytes)
                return first * self._page_bytes, _PAGE.size + (low | high << 16)
        except (struct.error, OSError, IndexError):  # no tree that this file knows: LMDB will say what is wrong
            return None
        return None

    @staticmethod
    def _node(page: bytes, nodes: int, key: bytes) -> tuple[int, int, int, int, int]:
        """The last node whose key is not above the one sought (a branch's first stands for any): its header, its key's place."""
        low, high = 0, nodes
        while high - low > 1:
            middle = (low + high) // 2
            (start,) = _PLACE.unpack_from(page, _PAGE.size + 2 * middle)
            key_bytes = _NODE.unpack_from(page, start)[3]
            begin = start + _NODE.size
            low, high = (middle, high) if page[begin : begin + key_bytes] <= key else (low, middle)
        (start,) = _PLACE.unpack_from(page, _PAGE.size + 2 * low)
        return *_NODE.unpack_from(page, start), start + _NODE.size
