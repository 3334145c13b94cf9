"""The grammar of the wire: every message that a client and a node exchange.

A message is one frame of MessagePack, a map with its type under ``t``. A request without a place is answered in frames:
the slice's pixels in order, a piece after each :class:`Pixels`, then its labels and draws one after the other, after the
:class:`Filled`. Pieces are small enough for a cache, so that a slice is still being sent while its first bytes are copied
to their slot. A client may open further connections, its lanes, and have slices sent by them; a lane's identity is the
client's and one byte more, so that nobody can have them sent to somebody else. Everything is bounded and checked on arrival; nothing is ever executed or unpickled.

========== =================== ==================================================================
from       message             meaning
========== =================== ==================================================================
client     Hello               who I am; answer with what you serve
node       Welcome             instance, workers, golden hashes, and the facts of every split
client     Attach              open my segment of shared memory and prove it by its nonce
node       Attached            I can write there; or why I cannot
client     Request             make this slice, and put it there or send it
node       Pixels              here is the next piece of it
node       Filled              it is done
node       Failed              it cannot be done: this record is bad
node       UnknownClient            I do not know you (any more): say Hello
either     Ping, Pong          a sign of life
client     Bye                 I am leaving; forget my requests
client     StatusQuery         how are you
node       Status              like this
========== =================== ==================================================================
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from loader_service.errors import MessageError
from loader_service.types import DatasetFacts, Dtype, Installation, SliceId, Split, StageSeconds

PROTOCOL: Final = 5
"""Goes up whenever a message changes its shape or its meaning."""

CLIENT_ID_BYTES: Final = 16
MAX_CONNECTIONS: Final = 16
"""Of one client with one node: its own and its lanes, numbered from 1."""

MAX_CLIENT_MESSAGE_BYTES: Final = 16_384
"""Largest message a node takes from a client; libzmq cuts the connection of who sends more."""

Name = Annotated[str, Meta(max_length=255)]
Text = Annotated[str, Meta(max_length=4096)]
Instance = Annotated[str, Meta(min_length=32, max_length=32)]
Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
SegmentName = Annotated[str, Meta(pattern=r"^loader-service-[0-9a-f]{32}\Z")]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]


class _Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Base of all messages: a map with the type's name under ``t``."""


class Hello(_Message, frozen=True, tag="hello"):
    """A client introduces itself. ``client`` is for people to read: host and process."""

    protocol: int
    client: Name


class Welcome(_Message, frozen=True, tag="welcome"):
    """A node's answer to Hello. ``slot_bytes`` bounds a slice that is sent in frames.

    ``installation`` proves that the node makes the bytes that it must, and each split's facts that they are of that dataset.
    """

    protocol: int
    instance: Instance
    workers: Annotated[int, Meta(ge=1, le=65_536)]
    slot_bytes: Counter
    installation: Installation
    splits: dict[Split, DatasetFacts]


class Attach(_Message, frozen=True, tag="attach"):
    """Asks the node to open the client's shared memory."""

    segment: SegmentName


class Attached(_Message, frozen=True, tag="attached"):
    """The nonce read in the segment, or an empty one and the reason why it cannot be opened."""

    segment: SegmentName
    nonce: Annotated[bytes, Meta(max_length=16)]
    reason: Text = ""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where in the client's segment a slice goes: byte offsets from its start, and the part that guards it."""

    part: Annotated[int, Meta(ge=0, le=2**20)]
    generation: Counter
    images: Counter
    labels: Counter
    draws: Counter


class Request(_Message, frozen=True, tag="request"):
    """A credit and an order in one: the client has room for this slice.

    Without a place the slice comes back in frames, by the client's lane of that number; 0 is the connection that asks.
    ``instance`` is the node's that was asked; any other drops it.
    """

    instance: Instance
    id: Counter
    split: Split
    what: SliceId
    dtype: Dtype
    place: Place | None = None
    lane: Annotated[int, Meta(ge=0, lt=MAX_CONNECTIONS)] = 0

    def __post_init__(self) -> None:
        if not self.what.view.crop:
            raise ValueError("a request's view says how large its crops are, not 0")


class Pixels(_Message, frozen=True, tag="pixels"):
    """A frame follows: the pixels of the slice of request ``id`` from byte ``start`` on, where the last piece ended."""

    id: Counter
    start: Counter


class Filled(_Message, frozen=True, tag="filled"):
    """The slice of request ``id`` is complete; if it had no place, a frame with its labels and draws follows."""

    id: Counter


class Failed(_Message, frozen=True, tag="failed"):
    """The slice of request ``id`` cannot be made here: ``record`` is bad, because; -1 if no record is to blame.

    ``source`` is the name of the file that the record was made from, if it is known.
    """

    id: Counter
    record: Annotated[int, Meta(ge=-1, le=2**48)]
    reason: Text
    source: Text = ""


class UnknownClient(_Message, frozen=True, tag="stranger"):
    """The node does not know this client: it was restarted, or has not heard from it for long."""


class Ping(_Message, frozen=True, tag="ping"):
    """A sign of life that asks for one."""


class Pong(_Message, frozen=True, tag="pong"):
    """A sign of life."""


class Bye(_Message, frozen=True, tag="bye"):
    """The client leaves."""


class StatusQuery(_Message, frozen=True, tag="status?"):
    """Asks for a node's status; needs no Hello."""


class WorkerState(StrEnum):
    """States of a worker, as a status reports them."""

    STARTING = "starting"
    IDLE = "idle"
    WORKING = "working"


class WorkerStatus(msgspec.Struct, frozen=True):
    """One worker: its process, what it does, the slices and samples it has made, seconds it worked.

    ``stages`` is where those seconds went, ``stage`` the one it is in (empty: in none), ``record`` what it is at (-1:
    nothing).
    """

    pid: int
    state: WorkerState
    slices: int
    samples: int
    busy_s: float
    stages: StageSeconds = StageSeconds()
    stage: str = ""
    record: int = -1


class ClientStatus(msgspec.Struct, frozen=True):
    """One client: its name, how it is reached (shm or tcp), queue length, slices, samples and bytes delivered."""

    name: str
    transport: str
    queued: int
    slices: int
    samples: int
    delivered_bytes: int = 0


class Status(_Message, frozen=True, tag="status"):
    """What a node tells of itself: how it is, and sums since its start, whose differences are rates.

    ``bad_samples`` counts how often a record was called bad; ``send_s`` is the time that send slots waited for their
    bytes to leave, summed over slices.
    """

    protocol: int
    instance: Instance
    version: Name
    address: Name
    uptime_s: float
    memory_ceiling_bytes: int
    splits: dict[str, str]
    workers: tuple[WorkerStatus, ...]
    clients: tuple[ClientStatus, ...]
    leases: int
    reassigned: int
    restarts: int
    refused: int
    queued: int = 0
    samples: int = 0
    delivered_bytes: int = 0
    bad_samples: int = 0
    send_slots: int = 0
    send_slots_used: int = 0
    send_s: float = 0.0


class _Version(msgspec.Struct):
    """What a Welcome or a Status states in every version, whatever else it holds there."""

    t: str
    protocol: int


FromClient = Hello | Attach | Request | Ping | Pong | Bye | StatusQuery
FromNode = Welcome | Attached | Pixels | Filled | Failed | UnknownClient | Ping | Pong | Status

_encoder = msgspec.msgpack.Encoder()
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_node = msgspec.msgpack.Decoder(FromNode)
_version = msgspec.msgpack.Decoder(_Version)


def lane_id(client: bytes, lane: int) -> bytes:
    """The routing identity of a client's lane; of the client itself for lane 0."""
    return client + bytes([lane]) if lane else client


def encode(message: FromClient | FromNode) -> bytes:
    """A message as one frame."""
    return _encoder.encode(message)


def decode_from_client(frame: bytes | memoryview) -> FromClient:
    """What a client sent.

    Raises:
        MessageError: it is none of a client's messages, or out of bounds.
    """
    try:
        message: FromClient = _from_client.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(str(error)) from error
    return message


def decode_from_node(frame: bytes | memoryview) -> FromNode:
    """What a node sent.

    Raises:
        MessageError: it is none of a node's messages, or out of bounds.
    """
    try:
        message: FromNode = _from_node.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(str(error)) from error
    return message


def protocol_of(frame: bytes | memoryview) -> int | None:
    """The protocol version that a node's message states, also where the rest of it cannot be read; None if it states none."""
    try:
        return _version.decode(frame).protocol
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
