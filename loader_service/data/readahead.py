"""Read-ahead: ask the disk for all records of a slice at once, before the first of them is read.

LMDB reads by touching mapped pages: one record after another, a few pages at a time, and it waits for each. A disk delivers
several times as much if it gets many requests at a time, for no more than is needed. So when reads are slow, this module
gives the operating system the file ranges of a slice's records with posix_fadvise(WILLNEED). This is only a hint: the
records are then read through LMDB, so a wrong hint costs time and nothing else.

LMDB tells the place of a record only by touching it. So this module walks LMDB's tree itself, with pread, by the page
format (data version 1, 64-bit; lmdb.h, mdb.c: MDB_page, MDB_node, MDB_db):

====== ======================================================================================================
page   number (8 bytes), unused (2), flags (2), lower (2), upper (2); then the offsets of the nodes (2 each), up
       to ``lower``
node   low half of the size or child page (2), high half (2), flags, or in a branch the child's top bits (2), key
       size (2); then the key
value  after the key; for a big value, the number of its first page, where the value follows the page header
====== ======================================================================================================
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
"""A record that takes longer to read came from the disk; from memory LMDB takes 2 us for 22 KB and 5 us for 192 KB."""

SLICES: Final = 64
"""Slices that are read ahead after a slow one. The next is then tried without, because asking costs 15 us a record."""

_PAGE: Final = struct.Struct("<8x2xHHH")
_NODE: Final = struct.Struct("<HHHH")
_PLACE: Final = struct.Struct("<H")
_NUMBER: Final = struct.Struct("<Q")
_DATABASE: Final = struct.Struct("<IHHQQQQQ")  # md_pad, md_flags, md_depth, numbers of pages and entries, md_root
_BRANCH, _LEAF, _BIG = 1, 2, 1  # P_BRANCH and P_LEAF of a page, F_BIGDATA of a node
_DEEPEST: Final = 32  # LMDB's limit on the depth of a tree (CURSOR_STACK); it also ends a cycle in a damaged file


class ReadAhead:
    """The read-ahead of one process for one environment.

    Args:
        path: the environment's data file.
        database: value of the records' sub-database in the main database, an MDB_db.
        page_bytes: page size of the environment.
    """

    def __init__(self, path: Path, database: bytes, page_bytes: int) -> None:
        self.database = database
        self._root = _DATABASE.unpack(database)[-1]  # stays valid: a finished environment never changes
        self._page_bytes = page_bytes
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._file)  # on a call, or when this object is collected
        self._left = 1  # slices still to read ahead; the first one measures whether more are needed

    @property
    def is_wanted(self) -> bool:
        """True if the next slice should be read ahead: nothing was measured yet, or a recent slice was slow."""
        return self._left > 0

    def ask(self, numbers: npt.NDArray[np.int64]) -> None:
        """Ask the disk for records without waiting for them; do nothing while reads are fast.

        Args:
            numbers: (n,) int64, the record numbers.
        """
        if not self.is_wanted:
            return
        self._left -= 1
        for number in numbers.tolist():
            if place := self.place(number):
                os.posix_fadvise(self._file, *place, os.POSIX_FADV_WILLNEED)

    def learn(self, records: int, seconds: float) -> None:
        """Note how long the records of a slice took to read; a slow slice turns read-ahead on for SLICES slices."""
        if seconds > SLOW_S * records:  # the mean: a slice that is mostly in memory is fast enough
            self._left = SLICES

    def place(self, number: int) -> tuple[int, int] | None:
        """Return offset and length in the file of a big record's pages; None for a small, missing or unknown record."""
        key = number.to_bytes(8, "big")  # records.KEY; big-endian, so that bytes sort as numbers
        at = self._root
        try:
            for _ in range(_DEEPEST):
                # pread, not LMDB's map: a page that cannot be read is an OSError here, and a SIGBUS there.
                page = os.pread(self._file, self._page_bytes, at * self._page_bytes)
                flags, lower, _ = _PAGE.unpack_from(page)
                # `lower` is where the node offsets end; each has two bytes.
                low, high, node_flags, key_bytes, begin = self._node(page, (lower - _PAGE.size) // 2, key)
                if flags & _BRANCH:
                    at = low | high << 16 | node_flags << 32  # 48 bits of the child's page number, in three fields
                    continue
                if not flags & _LEAF or page[begin : begin + key_bytes] != key or not node_flags & _BIG:
                    return None  # no such record, or a small one: it lies in this leaf, which was just read
                # A big value's pages have one page header, on the first of them.
                (first,) = _NUMBER.unpack_from(page, begin + key_bytes)
                return first * self._page_bytes, _PAGE.size + (low | high << 16)
        except (struct.error, OSError, IndexError):  # a damaged tree: LMDB reports it when it reads the record
            return None
        return None

    @staticmethod
    def _node(page: bytes, nodes: int, key: bytes) -> tuple[int, int, int, int, int]:
        """Find the last node whose key is not above ``key`` by binary search; return its header and its key's offset.

        The first node is never compared: in a branch its key is empty and stands for all smaller keys.
        """
        low, high = 0, nodes
        while high - low > 1:
            middle = (low + high) // 2
            (start,) = _PLACE.unpack_from(page, _PAGE.size + 2 * middle)
            key_bytes = _NODE.unpack_from(page, start)[3]
            begin = start + _NODE.size  # LMDB compares keys as bytes, as Python does below
            low, high = (middle, high) if page[begin : begin + key_bytes] <= key else (low, middle)
        (start,) = _PLACE.unpack_from(page, _PAGE.size + 2 * low)
        return *_NODE.unpack_from(page, start), start + _NODE.size
