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

_WORDS: Final = struct.Struct("<QQ")
"""HEADER as two words: label, codec number and, in the three upper bytes, the seal; then the payload's checksum."""

_SEALED: Final = struct.Struct("<QQQ")
"""Record number, the first word without its seal, the payload's checksum."""

_SEAL_BITS: Final = 24
_PLAIN_BITS: Final = 40  # label and codec number
_PLAIN: Final = (1 << _PLAIN_BITS) - 1


def _seal(number: int, plain: int, checksum: int) -> int:
    """Return the seal of a record, 1 .. 2**24 - 1."""
    # One damage in 17 million is missed. A hash of zeros becomes 1, because zeros mean that there is no seal.
    return xxhash.xxh3_64_intdigest(_SEALED.pack(number, plain, checksum)) % (1 << _SEAL_BITS) or 1


def seal(number: int, value: memoryview | bytearray) -> None:
    """Write the seal of record ``number`` into its header."""
    word, checksum = _WORDS.unpack_from(value)
    plain = word & _PLAIN
    _WORDS.pack_into(value, 0, plain | _seal(number, plain, checksum) << _PLAIN_BITS, checksum)


def unsealed(value: bytes | memoryview) -> bytes:
    """Return a record's header without its seal, as the fingerprint covers it."""
    return HEADER.pack(*HEADER.unpack_from(value))


def matches(number: int, value: memoryview, payload: memoryview) -> bool:
    """Return True if a stored record matches both of its checksums.

    Args:
        number: record number.
        value: header and payload.
        payload: the payload alone.
    """
    word, checksum = _WORDS.unpack_from(value)
    if xxhash.xxh3_64_intdigest(payload) != checksum:
        return False
    stored = word >> _PLAIN_BITS
    return not stored or stored == _seal(number, word & _PLAIN, checksum)


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
