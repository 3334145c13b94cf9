"""The wire protocol: every message that a client and a node exchange.

The client's socket is a ZeroMQ DEALER, the node's a ROUTER. A message is one frame of MessagePack, a map with the tag of
its type under ``t``; two types are followed by a frame of bytes, in the same ZeroMQ message. Fields are bounded and
checked on arrival; nothing that arrives is executed or unpickled. A node refuses fields that it does not know; a client ignores
them, so that a node may say more than a client of the same protocol can read.

========== =============== ============ ===========================================================================
sender     message         tag          meaning
========== =============== ============ ===========================================================================
client     Hello           hello        introduces the client; a repeated Hello discards its earlier requests
node       Welcome         welcome      answers Hello: instance, workers, golden hashes, facts of every split
client     Attach          attach       asks the node to open the client's segment of shared memory
node       Attached        attached     answers Attach: whether the node writes into the segment
client     Request         request      asks for one slice, to be written to a place or sent in frames
node       Pixels          pixels       carries a frame of the slice's pixels
node       Filled          filled       answers Request: the slice is complete
node       Failed          failed       answers Request: the slice cannot be made, and which record is the reason
node       UnknownClient   stranger     the node does not know the sender; it must say Hello again
node       Refused         refused      answers Hello: the node does not take this client, and why
both       Ping            ping         asks for a Pong; the node answers at once
both       Pong            pong         shows that the sender is alive
client     Bye             bye          the client leaves; the node discards its requests
client     StatusQuery     status?      asks for a Status; needs no Hello
node       Status          status       answers StatusQuery: state and counters of the node
========== =============== ============ ===========================================================================

A conversation::

    Hello    -> Welcome
    Hello    -> Refused                                 another version, or the node has as many clients as it takes
    Attach   -> Attached                                shared memory only: the nonce proves that the segment is the client's
    Request  -> Filled                                  with a place: the slice lies in the client's segment
    Request  -> Pixels + frame, ..., Filled + frame     without a place: the slice travels in frames
    Request  -> Failed

**Slices in frames.** Each Pixels carries the next pixels of the slice, in order; the Filled carries its labels and then
its draws. The frames are small enough for a CPU's cache, and the client copies one while the node sends the next.

**Lanes.** A client may open more connections to the same node, its lanes, and name a lane in each request; the frames
then come over that lane. A lane's identity is the client's 16 bytes plus one byte with its number, so no client can
direct frames to another. A lane carries Ping, Pong and frames, nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from loader_service.errors import MessageError
from loader_service.types import MAX_SLICE, DatasetFacts, Dtype, Installation, SliceId, Split, StageSeconds

PROTOCOL: Final = 6
"""Version of the protocol; it increases when any message changes its fields or its meaning."""

CLIENT_ID_BYTES: Final = 16
"""Random bytes that identify a client; they are the routing identity of its socket."""

MAX_CONNECTIONS: Final = 16
"""Upper bound of the connections between one client and one node: number 0 is the client's own, the others are lanes."""

# A Request with MAX_EXCLUDED records is the largest: 9 bytes for each in MessagePack, and a few hundred for the rest.
MAX_CLIENT_MESSAGE_BYTES: Final = 16_384
"""Upper bound of a client's message; libzmq closes the connection of a peer that sends a larger one."""

_AREA_ALIGNMENT_BYTES: Final = 4096
"""The areas of a slot begin on page boundaries."""

_LABEL_BYTES: Final = 8  # int64

# Types of fields, with their bounds.
Name = Annotated[str, Meta(max_length=255)]
Text = Annotated[str, Meta(max_length=4096)]
Instance = Annotated[str, Meta(min_length=32, max_length=32)]
Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
# \Z, since $ would also match before a final newline. A name that matches cannot lead out of /dev/shm.
SegmentName = Annotated[str, Meta(pattern=r"^loader-service-[0-9a-f]{32}\Z")]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]


class _Message(msgspec.Struct, frozen=True, tag_field="t"):
    """The base of all messages: a map with the type's tag under ``t``. Unknown fields of a node's message are ignored."""


# A field that a node does not know would change what the client asks for, so it is an error there.
class _Strict(_Message, frozen=True, forbid_unknown_fields=True):
    """The base of the messages that a client sends."""


class Hello(_Strict, frozen=True, tag="hello"):
    """The introduction of a client. ``client`` is a name for people: host and process."""

    protocol: int
    client: Name


class Welcome(_Message, frozen=True, tag="welcome"):
    """The node's answer to Hello.

    Fields:
        instance: random identity of this run of the node; requests carry it.
        slot_bytes: upper bound of a slice that is sent in frames.
        installation: golden hash that shows that the node's software makes the right bytes.
        splits: facts of each split, which show that its dataset is the right one.
    """

    protocol: int
    instance: Instance
    workers: Annotated[int, Meta(ge=1, le=65_536)]
    slot_bytes: Counter
    installation: Installation
    splits: dict[Split, DatasetFacts]


class SlotLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The layout of the slots in a client's segment, from which the place of every slice follows.

    A slot holds one batch in three areas: pixels, labels, draws. A part is a range of samples of a slot, the same range in
    each area, and holds one slice. The segment numbers the parts of all slots in one row.

    Fields:
        slots: number of slots.
        batch_size: samples per slot.
        slice_samples: samples per part; the last part of a slot may have fewer.
        image_bytes, draws_bytes: bytes of one sample's pixels and draws.
    """

    slots: Annotated[int, Meta(ge=1, le=2**16)]
    batch_size: Annotated[int, Meta(ge=1, le=2**16)]
    slice_samples: Annotated[int, Meta(ge=1, le=MAX_SLICE)]
    image_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    draws_bytes: Annotated[int, Meta(ge=1, le=2**16)]

    @property
    def parts_per_slot(self) -> int:
        """Number of parts of a slot."""
        return -(-self.batch_size // self.slice_samples)  # ceil

    @property
    def parts(self) -> int:
        """Number of parts of all slots."""
        return self.slots * self.parts_per_slot

    @property
    def labels(self) -> int:
        """Offset of the labels from the slot's start, in bytes; the pixels are at 0."""
        return _aligned(self.batch_size * self.image_bytes)

    @property
    def draws(self) -> int:
        """Offset of the draws from the slot's start, in bytes."""
        return self.labels + _aligned(self.batch_size * _LABEL_BYTES)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.draws + _aligned(self.batch_size * self.draws_bytes)

    def samples(self, part: int) -> int:
        """Return the number of samples of a part."""
        return min(self.slice_samples, self.batch_size - self._first(part))

    def offsets(self, part: int) -> tuple[int, int, int]:
        """Return the offsets of a part's pixels, labels and draws from the start of the slots, in bytes."""
        first, base = self._first(part), part // self.parts_per_slot * self.slot_bytes
        return (
            base + first * self.image_bytes,
            base + self.labels + first * _LABEL_BYTES,
            base + self.draws + first * self.draws_bytes,
        )

    def _first(self, part: int) -> int:
        """Return the number of a part's first sample within its slot."""
        return part % self.parts_per_slot * self.slice_samples


class Attach(_Strict, frozen=True, tag="attach"):
    """A client's request to open its segment of shared memory.

    Fields:
        segment: the segment's name.
        nonce: the one in its header, which only those who can open the segment can read: it proves that the segment is the
            client's own. The node compares it and never sends it.
        layout: the layout of its slots.
    """

    segment: SegmentName
    nonce: Nonce
    layout: SlotLayout


class Attached(_Message, frozen=True, tag="attached"):
    """The node's answer to Attach: whether it writes into the segment; if not, a sentence for people.

    The sentence is the same for all causes that a client could use to look for other segments.
    """

    segment: SegmentName
    accepted: bool
    reason: Text = ""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The place of a slice in the client's segment.

    It has no offsets: they follow from the part and the layout of the Attach. So the place that is written is always the
    one that the part guards.

    Fields:
        part, generation: the part that guards the place, and the generation in which it may be written: see ``shm.py``.
    """

    part: Annotated[int, Meta(ge=0, le=2**32)]
    generation: Counter


class Request(_Strict, frozen=True, tag="request"):
    """A request for one slice. It is also a credit: the client has a free slot for the slice.

    Fields:
        instance: the instance of the node that the client means. Any other instance drops the request, so a request that
            was queued for a dead node writes nothing.
        id: number of the request, chosen by the client; the answer repeats it.
        what: identity of the slice.
        place: destination in shared memory; None to receive the slice in frames.
        lane: the connection that carries the frames; 0 is the one that carried the request.
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
            raise ValueError("the view of a request must state the side of its crops, not 0")


class Pixels(_Message, frozen=True, tag="pixels"):
    """The head of a frame of pixels of request ``id``; they start at byte ``start`` of the slice, where the last ended."""

    id: Counter
    start: Counter


class Filled(_Message, frozen=True, tag="filled"):
    """The slice of request ``id`` is complete. Without a place, a frame with its labels and then its draws follows."""

    id: Counter


class Failed(_Message, frozen=True, tag="failed"):
    """The slice of request ``id`` cannot be made by this node.

    Fields:
        record: number of the bad record; -1 if the reason is not a record.
        reason: sentence for people.
        source: name of the file that the record was made from, if it is known.
    """

    id: Counter
    record: Annotated[int, Meta(ge=-1, le=2**48)]  # the upper bound of DatasetFacts.count
    reason: Text
    source: Text = ""


# The tag is older than the class's name; another tag would be another PROTOCOL.
class UnknownClient(_Message, frozen=True, tag="stranger"):
    """The node does not know this client: it was restarted, or the client was silent for too long. It is sent once."""


# Clients before protocol 6 do not know this type. They read its version by _Version and report that, as they do for every
# message of another version. So its first two fields, ``t`` and ``protocol``, must stay in every version.
class Refused(_Message, frozen=True, tag="refused"):
    """The node does not take this client: it speaks another version of the protocol, or the node is full.

    Fields:
        protocol: the node's version.
        reason: sentence for people.
    """

    protocol: int
    reason: Text


class Ping(_Strict, frozen=True, tag="ping"):
    """A sign of life that asks for a Pong."""


class Pong(_Strict, frozen=True, tag="pong"):
    """A sign of life."""


class Bye(_Strict, frozen=True, tag="bye"):
    """The end of a client; the node discards its requests."""


class StatusQuery(_Strict, frozen=True, tag="status?"):
    """A request for the node's status; it needs no Hello."""


class WorkerState(StrEnum):
    """States of a worker, as a status reports them."""

    STARTING = "starting"
    IDLE = "idle"
    WORKING = "working"


class WorkerStatus(msgspec.Struct, frozen=True):
    """The status of one worker.

    Fields:
        pid: its process; 0 while it starts.
        slices, samples: written since the node started, also by earlier processes of this worker.
        busy_s: seconds that it worked on leases.
        stages: the same seconds, by stage.
        stage: the stage that it is in now; empty if none.
        record: the record that it reads now; -1 if none.
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
    """The status of one client.

    Fields:
        name: for people, from its Hello.
        transport: ``shm`` if the node writes into its segment, ``tcp`` if it sends frames.
        queued: requests that wait for a worker or a send slot.
        slices, samples, delivered_bytes: delivered since its Hello.
    """

    name: str
    transport: str
    queued: int
    slices: int
    samples: int
    delivered_bytes: int = 0


class Status(_Message, frozen=True, tag="status"):
    """The status of a node: its present state, and counters since its start, whose differences are rates.

    Fields:
        splits: fingerprint by split.
        leases: slices that workers hold now.
        reassigned: leases that moved to another worker.
        restarts: workers that died and were replaced.
        refused: messages that broke the protocol, requests that no node could serve, and keys that are not allowed.
        queued: requests that wait for a worker or a send slot.
        bad_samples: failures that named a record.
        send_slots, send_slots_used: slots for slices in frames, and those in use.
        send_s: seconds from handing a slice to libzmq to the release of its slot, summed over slices.
        max_clients: most clients that the node takes; 0 if it does not say.
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
    max_clients: int = 0


# Without forbid_unknown_fields, so that it decodes messages of other versions, too.
class _Version(msgspec.Struct):
    """The fields that a Hello, a Welcome, a Refused and a Status have in every version of the protocol."""

    t: str
    protocol: int


FromClient = Hello | Attach | Request | Ping | Pong | Bye | StatusQuery
FromNode = Welcome | Attached | Pixels | Filled | Failed | UnknownClient | Refused | Ping | Pong | Status

# Decoders are made once: each compiles its union of types.
_encoder = msgspec.msgpack.Encoder()
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_node = msgspec.msgpack.Decoder(FromNode)
_version = msgspec.msgpack.Decoder(_Version)


def lane_id(client: bytes, lane: int) -> bytes:
    """Return the routing identity of a client's lane: for lane 0 the client's own."""
    return client + bytes([lane]) if lane else client  # one byte is enough for MAX_CONNECTIONS


def encode(message: FromClient | FromNode) -> bytes:
    """Encode a message as one frame."""
    return _encoder.encode(message)


def decode_from_client(frame: bytes | memoryview) -> FromClient:
    """Decode a frame from a client.

    Raises:
        MessageError: the frame is no message of a client, or a field is out of bounds.
    """
    try:
        message: FromClient = _from_client.decode(frame)
    # ValueError: the checks in __post_init__. RecursionError: maps nested deeper than Python's stack.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(str(error)) from error
    return message


def decode_from_node(frame: bytes | memoryview) -> FromNode:
    """Decode a frame from a node.

    Raises:
        MessageError: the frame is no message of a node, or a field is out of bounds.
    """
    try:
        message: FromNode = _from_node.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(str(error)) from error
    return message


def advice(node: int, client: int) -> str:
    """Return what to do about a node and a client of different versions of the protocol, as part of a sentence."""
    if node < client:
        return "the node is older: upgrade it first, to the client's release of loader-service (nodes before clients)"
    return "the client is older: upgrade it to the node's release of loader-service (nodes before clients)"


def protocol_of(frame: bytes | memoryview) -> int | None:
    """Return the protocol version in a message, even if this version cannot decode the rest; None without one."""
    try:
        return _version.decode(frame).protocol
    # An error here would hide the first one, which the caller reports.
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _aligned(size: int) -> int:
    return -(-size // _AREA_ALIGNMENT_BYTES) * _AREA_ALIGNMENT_BYTES  # ceil
