"""The checksums of stored records, and which records a node has compared with them.

A record's header holds two checksums:

- The xxh3-64 of the payload.
- The seal, three bytes of a hash over the record's number and the rest of the header. Without it, a damaged label would be
  another label, and damage in LMDB's tree could serve one record under the number of another. Records of version 0.1 have
  zeros in its place: they have no seal, and their labels are checked by ``verify`` alone, through the fingerprint.

The fingerprint is that of headers without seals, so it is the same whichever version wrote the records.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from loader_service.data.codecs import HEADER

SEAL: Final = slice(5, 8)
"""The seal's bytes in a header; HEADER skips them."""

_NO_SEAL: Final = bytes(3)
_SEALED: Final = struct.Struct("<QIBQ")
"""Record number, label, codec number, checksum of the payload."""


def seal(number: int, header: bytes | memoryview) -> bytes:
    """Return the seal of record ``number`` with this header: three bytes, never all zero."""
    # 24 bits miss one damage in 17 million. A hash of zeros becomes 1, because zeros mean that there is no seal.
    return (xxhash.xxh3_64_intdigest(_SEALED.pack(number, *HEADER.unpack_from(header))) % 2**24 or 1).to_bytes(
        3, "little"
    )


def unsealed(header: bytes | memoryview) -> bytes:
    """Return a record's header without its seal, as the fingerprint covers it."""
    return HEADER.pack(*HEADER.unpack_from(header))


def matches(number: int, value: memoryview) -> bool:
    """Return True if a stored record matches both of its checksums.

    Args:
        number: record number.
        value: header and payload.
    """
    if xxhash.xxh3_64_intdigest(value[HEADER.size :]) != HEADER.unpack_from(value)[2]:
        return False
    stored = bytes(value[SEAL])
    return stored in (_NO_SEAL, seal(number, value))


class Checked:
    """The records whose checksums were compared, one bit each.

    The bits are in anonymous shared memory: processes that are forked after this object is made share them. Only pages that
    are used take memory, 125 MB at most for a billion records.

    Fields:
        max_bytes: memory of the bits once all are set.

    Args:
        count: number of records.
    """

    def __init__(self, count: int) -> None:
        self.max_bytes = -(-count // (8 * mmap.PAGESIZE)) * mmap.PAGESIZE  # whole pages
        self._bits = np.frombuffer(mmap.mmap(-1, self.max_bytes), np.uint8)  # the array keeps the map open

    def missing(self, numbers: npt.NDArray[np.int64]) -> list[int]:
        """Return the indices of the records in ``numbers``, (n,) int64, that nobody has compared yet."""
        bits: npt.NDArray[np.uint8] = self._bits[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1
        return np.flatnonzero(bits == 0).tolist()

    def add(self, number: int) -> None:
        """Note that a record matches its checksums."""
        # Not atomic: another process may overwrite the bit with the old byte, and the record is compared once more. No bit
        # is ever set that nobody set.
        self._bits[number >> 3] |= 1 << (number & 7)
