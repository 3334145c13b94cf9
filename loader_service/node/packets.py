"""What a dispatcher, its fork server and its workers say to one another, over socket pairs made before the fork.

The pairs are SOCK_SEQPACKET: a message is a packet, the end of a process is an end of file, no name on disk outlives a
crash and no stranger can connect.
"""

from __future__ import annotations

from typing import Final

import msgspec

from loader_service.types import Dtype, SliceId, Split, StageSeconds
from loader_service.wire.messages import Place

MAX_PACKET_BYTES: Final = 65_536


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Dispatcher to worker: write this slice at this place of that segment; without a name, of the node's own send slots."""

    id: int
    split: Split
    what: SliceId
    dtype: Dtype
    segment: str
    place: Place


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to dispatcher: the datasets are open."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Worker to dispatcher: the slice is written; it took so many seconds, of which these went into its stages."""

    id: int
    seconds: float
    stages: StageSeconds


class Bad(msgspec.Struct, frozen=True, tag="bad"):
    """Worker to dispatcher: the slice cannot be written; ``record`` is to blame, or -1 if none is."""

    id: int
    record: int
    reason: str
    source: str = ""  # the file that the record was made from


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Dispatcher to fork server, with the worker's end of a socket pair attached: start worker ``index``."""

    index: int


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Fork server to dispatcher: worker ``index`` runs as ``pid``."""

    index: int
    pid: int


class Died(msgspec.Struct, frozen=True, tag="died"):
    """Fork server to dispatcher: ``pid`` is gone and reaped; ``code`` as ``os.waitstatus_to_exitcode`` gives it."""

    index: int
    pid: int
    code: int


encode: Final = msgspec.msgpack.Encoder().encode
decode_lease: Final = msgspec.msgpack.Decoder(Lease).decode
decode_answer: Final = msgspec.msgpack.Decoder(Ready | Done | Bad).decode
decode_fork: Final = msgspec.msgpack.Decoder(Fork).decode
decode_fork_server: Final = msgspec.msgpack.Decoder(Forked | Died).decode
