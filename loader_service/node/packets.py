"""The packets between a dispatcher, its fork server and its workers.

They travel over socket pairs of type SOCK_SEQPACKET, made before each fork. One packet is one message, and the end of a
process is an end of file. There is no address, so nothing remains after a crash and no other process can connect.

=========== =========== ========= ==========================================================
sender      receiver    packet    meaning
=========== =========== ========= ==========================================================
dispatcher  fork server Fork      start a worker; its end of a socket pair is attached
fork server dispatcher  Forked    the worker's process exists
worker      dispatcher  Ready     its datasets are open
dispatcher  worker      Lease     write this slice
dispatcher  worker      Release   unmap this segment
worker      dispatcher  Done      the slice is written
worker      dispatcher  Bad       the slice cannot be written
fork server dispatcher  Died      the worker's process has ended and is reaped
=========== =========== ========= ==========================================================
"""

from __future__ import annotations

from typing import Final

import msgspec

from loader_service.types import Dtype, SliceId, Split, StageSeconds

MAX_PACKET_BYTES: Final = 65_536
"""Upper bound of a packet: a Lease with MAX_EXCLUDED records is the largest, about 10 KB."""


# No bounds on these fields: both ends are forks of one process, and nobody else has the socket.
class Destination(msgspec.Struct, frozen=True):
    """The destination of a slice in a segment.

    Fields:
        part, generation: the part that guards it, and the generation in which it may be written: see ``wire/shm.py``.
        images, labels, draws: offsets of the three arrays from the segment's start, in bytes.
    """

    part: int
    generation: int
    images: int
    labels: int
    draws: int


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Dispatcher to worker: write a slice.

    Fields:
        id: number of the lease; the answer repeats it.
        split, what, dtype: the slice.
        segment: name of the client's segment; empty for the node's own send slots.
        to: destination in that segment.
    """

    id: int
    split: Split
    what: SliceId
    dtype: Dtype
    segment: str
    to: Destination


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Dispatcher to worker: unmap a segment, since its client has left. The worker reads it after its present lease."""

    segment: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to dispatcher: the datasets are open, and the worker waits for leases."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Worker to dispatcher: the slice of lease ``id`` is written. ``seconds`` is the whole time, ``stages`` its parts."""

    id: int
    seconds: float
    stages: StageSeconds


class Bad(msgspec.Struct, frozen=True, tag="bad"):
    """Worker to dispatcher: the slice of lease ``id`` cannot be written, because of ``record``, or -1 for another reason."""

    id: int
    record: int
    reason: str
    source: str = ""  # name of the file that the record was made from


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Dispatcher to fork server, with the worker's end of a socket pair attached: start worker ``index``."""

    index: int


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Fork server to dispatcher: worker ``index`` runs as ``pid``."""

    index: int
    pid: int


class Died(msgspec.Struct, frozen=True, tag="died"):
    """Fork server to dispatcher: ``pid`` has ended and is reaped; ``code`` is that of ``os.waitstatus_to_exitcode``."""

    index: int
    pid: int
    code: int


encode: Final = msgspec.msgpack.Encoder().encode
decode_order: Final = msgspec.msgpack.Decoder(Lease | Release).decode
decode_answer: Final = msgspec.msgpack.Decoder(Ready | Done | Bad).decode
decode_fork: Final = msgspec.msgpack.Decoder(Fork).decode
decode_fork_server: Final = msgspec.msgpack.Decoder(Forked | Died).decode
