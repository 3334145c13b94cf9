"""The messages between the pool and its workers, and the layout of their shared memory.

Each worker has a socket pair (SOCK_SEQPACKET: one message is one packet, in MessagePack) and a memory file of AREAS areas.
The pool names a free area in each :class:`Job`. The worker writes records there and reports their places in :class:`Done`,
which gives the area back to the pool. An area holds::

    [0, sum_offset)              stored records, one after another
    [sum_offset, area_bytes)     (side, side, 3) uint16, the sum of the chunk's images

After the areas comes one int64: the item of the current job that the worker is processing, counted from 1; 0 for none. It
stays there when the worker dies, and so names the item.
"""

from __future__ import annotations

import mmap
from typing import Final

import msgspec

from loader_service.data.codecs import Codec, raw_bytes
from loader_service.datasets.preprocessing.sources import Item

CHUNK_ITEMS: Final = 32
"""Items per job. Messages and sums then cost little compared with decoding, little work is repeated after a death, and the
sum of the images fits into 16 bits."""

AREAS: Final = 2
"""Areas per worker: one is written while the other waits to be stored."""

MESSAGE_BYTES: Final = 2**20
"""Largest message: 32 items with paths of at most 4,096 bytes need less."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message from pool to worker: codec, time limit per item in seconds, and side of the records."""

    codec: Codec
    parameters: dict[str, int | str]
    limit_s: float
    side: int

    @property
    def sum_offset(self) -> int:
        """Offset of the sum within an area, after the largest possible records.

        A JPEG at 4:4:4 has at most 6 bytes for each pixel of its whole blocks, plus 2,048 (libjpeg-turbo's tjBufSize).
        """
        whole = -(-self.side // 8) * 8  # a JPEG has whole blocks of 8 x 8 pixels
        return CHUNK_ITEMS * (2 * raw_bytes(whole) + 4096)  # 4,096: the 2,048 and the record's header, with a margin

    @property
    def area_bytes(self) -> int:
        """Bytes of an area, rounded up to whole pages."""
        # The sum is uint16: 2 bytes for each byte of a raw payload.
        return -(-(self.sum_offset + 2 * raw_bytes(self.side)) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def at_offset(self) -> int:
        """Offset within the memory of the number of the current item."""
        return AREAS * self.area_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of a worker's memory."""
        return self.at_offset + mmap.PAGESIZE


class Job(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker: make the records of these items in this area.

    ``refused`` holds reasons by index, for items that killed workers; they must not be opened again.
    """

    number: int
    area: int
    items: list[Item]
    refused: dict[int, str]


class Done(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: for each item, (offset, bytes) of its record in the area, or the reason why there is none.

    ``products`` holds the nine sums of colour products, row by row.
    """

    number: int
    outcomes: list[tuple[int, int] | str]
    products: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: the run must stop, for a reason that is not the fault of an image."""

    sentence: str


ToWorker = Setup | Job
FromWorker = Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
