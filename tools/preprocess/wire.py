"""What the pool and its workers say to each other, and the layout of the memory they share.

Each worker has a socket pair (SOCK_SEQPACKET: one message is one packet; MessagePack) and a memory file of AREAS areas.
The pool names a free area in each :class:`Job`; the worker writes there and tells what lies where in :class:`Done`; the
area is the pool's again from then on. An area holds::

    [0, CHUNK_ITEMS * SLOT_BYTES)     payloads, one after another
    [SUM_OFFSET, AREA_BYTES)          (256, 256, 3) uint32, the sum of the chunk's pictures
"""

from __future__ import annotations

from typing import Final

import msgspec

from loader_service.data.codecs import RAW_BYTES, Codec
from tools.preprocess.sources import Item

CHUNK_ITEMS: Final = 32
"""Items per job: messages and sums then cost nothing beside decoding, and little is done again after a death."""

SLOT_BYTES: Final = 400 * 1024
"""Largest payload: a JPEG of 256 x 256 pixels without subsampling has at most 395,264 bytes (libjpeg-turbo's bound)."""

SUM_OFFSET: Final = CHUNK_ITEMS * SLOT_BYTES
AREA_BYTES: Final = SUM_OFFSET + RAW_BYTES * 4
AREAS: Final = 2
"""One is written while the other waits to be stored."""

MESSAGE_BYTES: Final = 2**20
"""No message is larger: 32 items with paths of at most 4,096 bytes."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker, first: what payloads to make, and how long one picture may take."""

    codec: Codec
    parameters: dict[str, int | str]
    limit_s: float


class Job(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker: make the payloads of these items, in this area. ``refused`` are not to be touched again."""

    number: int
    area: int
    items: list[Item]
    refused: dict[int, str]


class At(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool, before each item: if I die now, it was this one's fault."""

    index: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: for each item where its payload lies in the area (offset, bytes), or why there is none.

    ``products`` are the nine sums of colour products, row by row.
    """

    number: int
    outcomes: list[tuple[int, int] | str]
    products: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: the run cannot go on, for a reason that is no picture's fault."""

    sentence: str


ToWorker = Setup | Job
FromWorker = At | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
