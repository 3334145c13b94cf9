"""What the pool and its workers say to each other, and the layout of the memory they share.

Each worker has a socket pair (SOCK_SEQPACKET: one message is one packet; MessagePack) and a memory file of AREAS areas.
The pool names a free area in each :class:`Job`; the worker writes there and tells what lies where in :class:`Done`; the
area is the pool's again from then on. An area holds::

    [0, sum_offset)              records as they are stored, one after another
    [sum_offset, area_bytes)     (side, side, 3) uint16, the sum of the chunk's pictures

Behind the areas is one number, int64: which of its job's items the worker is at, counted from 1; 0 if at none. A worker that
dies leaves it there.
"""

from __future__ import annotations

import mmap
from typing import Final

import msgspec

from loader_service.data.codecs import Codec, raw_bytes
from loader_service.datasets.preprocessing.sources import Item

CHUNK_ITEMS: Final = 32
"""Items per job: messages and sums then cost nothing beside decoding, little is done again after a death, and a sum of so
many pictures fits into 16 bits."""

AREAS: Final = 2
"""One is written while the other waits to be stored."""

MESSAGE_BYTES: Final = 2**20
"""No message is larger: 32 items with paths of at most 4,096 bytes."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker, first: what payloads to make, of how wide pictures, and how long one may take."""

    codec: Codec
    parameters: dict[str, int | str]
    limit_s: float
    side: int

    @property
    def sum_offset(self) -> int:
        """Where in an area the sum begins: behind the largest records.

        A JPEG without subsampling has at most 6 bytes for each pixel of its whole blocks, and 2,048 (libjpeg-turbo's bound).
        """
        whole = -(-self.side // 8) * 8
        return CHUNK_ITEMS * (2 * raw_bytes(whole) + 4096)

    @property
    def area_bytes(self) -> int:
        """Bytes of an area, in whole pages."""
        return -(-(self.sum_offset + 2 * raw_bytes(self.side)) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def at_offset(self) -> int:
        """Where in the memory the number of the item stands."""
        return AREAS * self.area_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of a worker's memory."""
        return self.at_offset + mmap.PAGESIZE


class Job(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker: make the records of these items, in this area. ``refused`` are not to be touched again."""

    number: int
    area: int
    items: list[Item]
    refused: dict[int, str]


class Done(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: for each item where its record lies in the area (offset, bytes), or why there is none.

    ``products`` are the nine sums of colour products, row by row.
    """

    number: int
    outcomes: list[tuple[int, int] | str]
    products: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: the run cannot go on, for a reason that is no picture's fault."""

    sentence: str


ToWorker = Setup | Job
FromWorker = Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
