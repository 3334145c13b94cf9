"""Damaged messages for the decoders, and for a running node.

Valid messages are damaged in their bytes or in their fields. The rules:

- A decoder raises MessageError and nothing else, and a message that it accepts survives encoding and decoding.
- A node keeps serving the same bytes, and its memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import psutil
import zmq

from loader_service import Loader, LocalNode, status
from loader_service.datasets.progress import Progress
from loader_service.errors import MessageError
from loader_service.types import RECORD_SIDE_PX, VIEWS, DatasetFacts, Installation, SliceId, mean_bytes
from loader_service.wire import messages
from loader_service.wire.messages import FromClient, FromNode, Place, Request, SlotLayout
from loader_service.wire.shm import Segment
from tools.errors import ToolFailed
from tools.sample_dataset import digest

INSTANCE: Final = "0123456789abcdef" * 2
SEGMENT: Final = f"loader-service-{INSTANCE}"
# Bounds of int32, of exact floats, int64 and uint64, and their neighbours; then odd texts, bytes and containers.
ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 0.0, -1.5, float("nan"), float("inf"), "", "x" * 300,
    "../../etc/passwd", "\x00", b"", b"\xff" * 64, [], [0] * 2000, {}, {"t": "hello"}, "train", "float32", "ten-crop",
)  # fmt: skip

MESSAGES_PER_CLIENT: Final = 500
"""A fuzzing client sends so many messages and disconnects without a Bye; then another connects."""

INPUTS_PER_STATUS: Final = 1_000
"""The node must answer a status query after each so many messages."""

WARM_UP: Final = 0.3
"""Share of the inputs after which a node has allocated every kind of buffer that it needs."""

GROWTH_BYTES: Final = 16 * 2**20
"""Growth that allocators may cause after that; a node that keeps 200 bytes of each of 100,000 inputs exceeds it."""

ANSWER_MS: Final = 10_000

SLOTS: Final = SlotLayout(1, 4, 4, 150_528, 12)
"""One slot with one part of 4 samples, for the slice that from_client() requests in shared memory."""


def from_client(instance: str = INSTANCE, segment: str = SEGMENT, nonce: bytes = bytes(16)) -> list[FromClient]:
    """Return one valid message of each type that a client sends."""
    what = SliceId(VIEWS["center"], 3, 2, 1, 4)  # seed, epoch, start, count
    return [
        messages.Hello(messages.PROTOCOL, "host:1"),
        messages.Attach(segment, nonce, SLOTS),
        Request(instance, 7, "train", what, "uint8", Place(0, 1)),
        Request(instance, 8, "train", msgspec.structs.replace(what, excluded=(5, 6)), "float32"),
        Request(instance, 9, "val", SliceId(VIEWS["ten-crop"], 0, 0, 0, 1), "uint8"),
        messages.Ping(),
        messages.Pong(),
        messages.StatusQuery(),
        messages.Bye(),
    ]


def from_node() -> list[FromNode]:
    """Return one valid message of each type that a node sends, but no Status, whose decoder is the same."""
    facts = DatasetFacts(
        5, ("a",), bytes(mean_bytes(RECORD_SIDE_PX)), (1.0,) * 3, (1.0,) * 3, (1.0,) * 9, INSTANCE, INSTANCE
    )
    return [
        messages.Welcome(
            messages.PROTOCOL, INSTANCE, 2, 2**24, Installation(INSTANCE, {"numpy": "2"}), {"train": facts}
        ),
        messages.Attached(SEGMENT, accepted=True),
        messages.Pixels(7, 4096),
        messages.Filled(7),
        messages.Failed(7, 3, "because", "cat/1.jpg"),
        messages.UnknownClient(),
        messages.Ping(),
        messages.Pong(),
    ]


def damage_bytes(rng: Random, frame: bytes, other: bytes) -> bytes:
    """Return a frame with some bytes changed, removed, added, or taken from another frame."""
    at = rng.randrange(len(frame) + 1)
    match rng.randrange(6):
        case 0:
            damaged = bytearray(frame)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(frame))] = rng.randrange(256)
            return bytes(damaged)
        case 1:
            return frame[:at]
        case 2:
            return frame[:at] + rng.randbytes(rng.randint(1, 32)) + frame[at:]
        case 3:
            return frame[:at] + frame[at + rng.randint(1, 16) :]
        case 4:
            return frame[:at] + other[rng.randrange(len(other)) :]
        case _:
            return rng.randbytes(rng.randint(0, 200))


def damage_fields(rng: Random, frame: bytes) -> bytes:
    """Return a well-formed frame with one field, at any depth, of an odd value, removed or added; seldom the type's tag."""
    tree = msgspec.msgpack.decode(frame)
    here = tree
    while True:  # goes down into nested maps until a field is chosen
        # Seldom the tag: a decoder looks at no field of a message of an unknown type.
        key = rng.choice([key for key in here if key != "t" or rng.random() < 0.1] or ["t"])
        if isinstance(here[key], dict) and here[key] and rng.random() < 0.7:
            here = here[key]
            continue
        match rng.randrange(4):
            case 0:
                del here[key]
            case 1:
                here[rng.choice(("x", "t", "id", "place"))] = rng.choice(ODD_VALUES)
            case _:
                here[key] = rng.choice(ODD_VALUES)
        break
    try:
        return msgspec.msgpack.encode(tree)
    except OverflowError:  # MessagePack has no integers beyond 64 bits
        return frame


def damaged(rng: Random, valid: list[bytes]) -> bytes:
    """Return one input: a damaged frame, or a valid one in a tenth of the cases."""
    frame = rng.choice(valid)
    kind = rng.random()
    if kind < 0.4:
        return damage_bytes(rng, frame, rng.choice(valid))
    return damage_fields(rng, frame) if kind < 0.9 else frame


def check_message(frame: bytes, decode: Callable[[bytes], Any]) -> bool:
    """Decode a frame; return whether it is a message.

    Raises:
        ToolFailed: the decoder broke a rule; the message has the input in hexadecimal.
    """
    try:
        message = decode(frame)
        if decode(messages.encode(message)) != message:
            raise ToolFailed(f"this message changes in encoding and decoding: {frame.hex()}.")
    except MessageError:  # the one permitted refusal
        return False
    except ToolFailed:
        raise
    # Any other exception would end a node's dispatcher or a client's session, so the input is shown.
    except Exception as error:
        raise ToolFailed(f"a decoder raised {error!r} at {frame.hex()}.") from error
    return True


def fuzz_decoders(rng: Random, inputs: int, progress: Progress) -> int:
    """Give damaged messages to both decoders; return how many they accepted.

    Raises:
        ToolFailed: a decoder broke a rule; the message has the input in hexadecimal.
    """
    passed = 0
    sides: list[tuple[list[bytes], Callable[[bytes], Any]]] = [
        ([messages.encode(message) for message in from_client()], messages.decode_from_client),
        ([messages.encode(message) for message in from_node()], messages.decode_from_node),
    ]
    for number in range(inputs):
        valid, decode = sides[number % 2]
        passed += check_message(damaged(rng, valid), decode)
        progress.advance()
    return passed


class FuzzingClient:
    """A client that sends arbitrary frames, and may never read the answers."""

    def __init__(self, context: zmq.Context[Any], address: str, *, reads: bool) -> None:
        self._reads = reads
        self._dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)  # close() drops what was not sent
        # 0 is no limit. With 1, answers pile up at the node, which must bound or drop them.
        self._dealer.setsockopt(zmq.RCVHWM, 0 if reads else 1)
        self._dealer.setsockopt(zmq.SNDHWM, 100)  # a node that stops reading blocks send() soon
        self._dealer.connect(address)

    def send(self, frames: list[bytes]) -> None:
        """Send a message; read the answers that have arrived, if this client reads.

        Raises:
            ToolFailed: the node accepts no messages.
        """
        if not self._dealer.poll(ANSWER_MS, zmq.POLLOUT):
            raise ToolFailed("the node no longer accepts messages.")
        self._dealer.send_multipart(frames)
        while self._reads and self._dealer.poll(0):  # never waits: an input may have no answer
            self._dealer.recv_multipart(copy=False)

    def instance(self) -> str:
        """Say Hello; return the node's instance.

        Raises:
            ToolFailed: the node does not answer.
        """
        self._dealer.send(messages.encode(messages.Hello(messages.PROTOCOL, "fuzz")))
        if not self._dealer.poll(ANSWER_MS):
            raise ToolFailed("the node does not answer a Hello.")
        welcome = messages.decode_from_node(self._dealer.recv_multipart()[0])
        assert isinstance(welcome, messages.Welcome)
        return welcome.instance

    def close(self) -> None:
        """Disconnect without a Bye."""
        self._dealer.close()


def private_bytes(dispatcher: int) -> int:
    """Return the bytes of a node's anonymous memory, which neither shared memory nor mapped files count in."""
    # Dispatcher, fork server and worker.
    pids = [dispatcher, *(process.pid for process in psutil.Process(dispatcher).children(recursive=True))]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    # The kernel prints kB, which are 1,024 bytes.
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def epoch_digests(address: str) -> list[str]:
    """Return digests of the batches that a regular client receives in one epoch, in frames."""
    with Loader(address, batch_size=64, timeout_s=60, transport="tcp") as loader:
        return [digest(batch) for batch in loader]


def fuzz_node(rng: Random, inputs: int, data: Path, progress: Progress) -> tuple[int, int]:
    """Send damaged messages to a running node; return how many it refused, and by how many bytes it grew.

    Raises:
        ToolFailed: it ended, hung, grew, or serves other bytes than before.
    """
    context: zmq.Context[Any] = zmq.Context()
    segment = Segment.create(SLOTS.slots * SLOTS.slot_bytes, SLOTS.parts)
    try:
        with LocalNode(data, workers=1) as node:
            before = epoch_digests(node.address)
            warm = 0
            sent = 0
            while sent < inputs:
                client = FuzzingClient(context, node.address, reads=rng.random() < 0.5)
                # The node's own instance and a segment that exists: else it would drop every Request before it looks
                # further.
                valid = [messages.encode(m) for m in from_client(client.instance(), segment.name, segment.nonce)]
                for _ in range(min(MESSAGES_PER_CLIENT, inputs - sent)):
                    frames = [damaged(rng, valid)]
                    if rng.random() < 0.02:
                        # Several frames, which no client sends.
                        frames += [rng.randbytes(rng.randrange(50))] * rng.randint(1, 5)
                    client.send(frames)
                    sent += 1
                    progress.advance()
                    if sent % INPUTS_PER_STATUS == 0:
                        status(node.address, timeout_s=ANSWER_MS / 1000)  # raises if the node hangs
                client.close()  # without a Bye: the node must forget it by itself
                # Between two clients, as at the end.
                if not warm and sent >= WARM_UP * inputs:
                    warm = private_bytes(node.pid)
            after = epoch_digests(node.address)
            refused = status(node.address).refused
            grown = private_bytes(node.pid) - warm
    finally:
        context.destroy(linger=0)  # closes the sockets first, also after an error
        segment.unlink()
        segment.close()
    if before != after:
        raise ToolFailed("the node serves other bytes than before.")
    if grown > GROWTH_BYTES:
        raise ToolFailed(f"the node grew by {grown / 2**20:.0f} MiB during {inputs:,} messages.")
    return refused, grown
