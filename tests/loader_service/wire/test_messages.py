"""The wire protocol: messages survive a round trip, and everything else is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_service.errors import MessageError
from loader_service.types import RECORD_SIDE_PX, DatasetFacts, Installation, SliceId, View, mean_bytes
from loader_service.wire import messages
from loader_service.wire.messages import Place, Request, SlotLayout

INSTANCE = "0" * 32
SEGMENT = "loader-service-" + "a" * 32
REQUEST = Request(INSTANCE, 7, "train", SliceId(View(basis=(1.0,) * 9), 3, 2, 1, 32), "uint8", Place(1, 2))
LAYOUT = SlotLayout(slots=3, batch_size=10, slice_samples=4, image_bytes=1000, draws_bytes=12)
FACTS = DatasetFacts(
    count=5,
    class_names=("a",),
    mean_image=bytes(mean_bytes(RECORD_SIDE_PX)),
    channel_means=(1.0,) * 3,
    eigenvalues=(1.0,) * 3,
    eigenvectors=(1.0,) * 9,
    fingerprint="0" * 32,
    golden="1" * 32,
)
FROM_CLIENT: list[messages.FromClient] = [
    messages.Hello(1, "me"),
    messages.Attach(SEGMENT, b"n" * 16, LAYOUT),
    REQUEST,
    messages.Ping(),
    messages.Pong(),
    messages.Bye(),
    messages.StatusQuery(),
]
FROM_NODE: list[messages.FromNode] = [
    messages.Welcome(1, INSTANCE, 2, 1 << 24, Installation("2" * 32, {"numpy": "2"}), {"train": FACTS}),
    messages.Attached(SEGMENT, accepted=False, reason="it is far away"),
    messages.Pixels(7, 4096),
    messages.Filled(7),
    messages.Failed(7, -1, "because"),
    messages.UnknownClient(),
    messages.Ping(),
    messages.Pong(),
]


@pytest.mark.parametrize("message", FROM_CLIENT, ids=lambda m: type(m).__name__)
def test_clients_messages_arrive_as_they_were_sent(message: messages.FromClient) -> None:
    """Every message of a client survives encoding and decoding."""
    assert messages.decode_from_client(messages.encode(message)) == message


@pytest.mark.parametrize("message", FROM_NODE, ids=lambda m: type(m).__name__)
def test_nodes_messages_arrive_as_they_were_sent(message: messages.FromNode) -> None:
    """Every message of a node survives encoding and decoding."""
    assert messages.decode_from_node(messages.encode(message)) == message


def test_a_nodes_message_is_not_a_clients() -> None:
    """Each side decodes only the messages that the other may send."""
    with pytest.raises(MessageError):
        messages.decode_from_client(messages.encode(messages.Filled(1)))
    with pytest.raises(MessageError):
        messages.decode_from_node(messages.encode(messages.Bye()))


@pytest.mark.parametrize(
    "change",
    [
        {"id": -1},
        {"split": "test"},
        {"dtype": "float64"},
        {"instance": "short"},
        {"what": {"view": {}, "seed": -1, "epoch": 0, "start": 0, "count": 1}},
        {"what": {"view": {}, "seed": 0, "epoch": 0, "start": 0, "count": 0}},
        {"what": {"view": {}, "seed": 0, "epoch": 0, "start": 0, "count": 1 << 20}},
        {"what": {"view": {"crop": 0}, "seed": 0, "epoch": 0, "start": 0, "count": 1}},
        {"what": {"view": {"crop": 1025}, "seed": 0, "epoch": 0, "start": 0, "count": 1}},
        {"what": {"view": {"jitter": float("nan")}, "seed": 0, "epoch": 0, "start": 0, "count": 1}},
        {"what": {"view": {"basis": [1.0] * 8}, "seed": 0, "epoch": 0, "start": 0, "count": 1}},
        {"place": {"part": -1, "generation": 0}},
        {"place": {"part": 0, "generation": 0, "images": 0}},
        {"extra": 1},
    ],
    ids=str,
)
def test_requests_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    """A request with any field out of bounds is refused."""
    fields = msgspec.to_builtins(REQUEST) | change
    with pytest.raises(MessageError):
        messages.decode_from_client(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b"short"},
        {"layout": {}},
        {"layout": msgspec.to_builtins(LAYOUT) | {"slots": 0}},
        {"layout": msgspec.to_builtins(LAYOUT) | {"batch_size": 1 << 20}},
        {"layout": msgspec.to_builtins(LAYOUT) | {"slice_samples": 0}},
        {"layout": msgspec.to_builtins(LAYOUT) | {"image_bytes": -1}},
    ],
    ids=str,
)
def test_segments_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    """An Attach with any field out of bounds is refused."""
    fields = {"t": "attach", "segment": SEGMENT, "nonce": b"n" * 16, "layout": msgspec.to_builtins(LAYOUT)}
    assert messages.decode_from_client(msgspec.msgpack.encode(fields)) == messages.Attach(SEGMENT, b"n" * 16, LAYOUT)
    with pytest.raises(MessageError):
        messages.decode_from_client(msgspec.msgpack.encode(fields | change))


def test_the_parts_of_a_layout_lie_side_by_side() -> None:
    """In each area, the parts of a slot follow each other without a gap, and a slot ends where the next one begins."""
    assert [LAYOUT.samples(part) for part in range(LAYOUT.parts)] == [4, 4, 2] * 3
    taken = sorted(
        (offset, offset + size * LAYOUT.samples(part))
        for part in range(LAYOUT.parts)
        for offset, size in zip(LAYOUT.offsets(part), (LAYOUT.image_bytes, 8, LAYOUT.draws_bytes), strict=True)
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= LAYOUT.slots * LAYOUT.slot_bytes
    assert LAYOUT.offsets(3)[0] == LAYOUT.slot_bytes


def test_segment_names_cannot_lead_elsewhere() -> None:
    """A path instead of a segment's name is refused when the message is decoded."""
    for name in ("/etc/passwd", SEGMENT + "/../x", SEGMENT + "\n", SEGMENT.upper()):
        with pytest.raises(MessageError):
            messages.decode_from_client(messages.encode(messages.Attach(name, b"n" * 16, LAYOUT)))


def _outcome(decode: Callable[[bytes], object], data: bytes) -> object:
    """Return the message or the MessageError; any other exception fails the test."""
    try:
        return decode(data)
    except MessageError as error:
        return error


@given(st.binary(max_size=200))
def test_rubbish_is_an_error_and_nothing_else(data: bytes) -> None:
    """Random bytes raise MessageError and no other exception."""
    assert isinstance(_outcome(messages.decode_from_client, data), MessageError)
    assert isinstance(_outcome(messages.decode_from_node, data), MessageError)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_request_is_an_error_or_a_request(at: int, byte: int) -> None:
    """A request with one changed byte decodes as a request or raises MessageError."""
    frame = bytearray(messages.encode(REQUEST))
    frame[at % len(frame)] = byte
    assert isinstance(_outcome(messages.decode_from_client, bytes(frame)), MessageError | Request)
