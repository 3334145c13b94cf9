"""The protocol as an example: one message of each type, with its bytes. `python -m tools.transcript` prints it.

docs/design/protocol.md contains this output. The author of another client or node can compare bytes with it, and a test
compares it with the code, so that no change of the wire passes unnoticed.
"""

from __future__ import annotations

import re
import textwrap
from typing import Final

import click

from loader_service.types import RECORD_SIDE_PX, VIEWS, DatasetFacts, Installation, SliceId, mean_bytes
from loader_service.wire import messages
from loader_service.wire.messages import FromClient, FromNode, Place, Request, SlotLayout

INSTANCE: Final = "0123456789abcdef" * 2
SEGMENT: Final = f"loader-service-{'fedcba9876543210' * 2}"
FACTS: Final = DatasetFacts(
    count=2,
    class_names=("ant", "bee"),
    mean_image=bytes(mean_bytes(RECORD_SIDE_PX)),
    channel_means=(123.5, 124.5, 125.5),
    eigenvalues=(0.25, 0.0625, 0.015625),
    eigenvectors=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    fingerprint="0" * 32,
    golden="1" * 32,
)

TRANSCRIPT: Final[tuple[FromClient | FromNode, ...]] = (
    messages.Hello(messages.PROTOCOL, "host:4711"),
    messages.Welcome(
        messages.PROTOCOL, INSTANCE, 2, 2**24, Installation("2" * 32, {"numpy": "2.4.6"}), {"train": FACTS}
    ),
    messages.Attach(SEGMENT, bytes(range(16)), SlotLayout(6, 128, 32, 150_528, 12)),
    messages.Attached(SEGMENT, accepted=True),
    Request(INSTANCE, 1, "train", SliceId(VIEWS["center"], 5, 0, 0, 2), "uint8", Place(0, 1)),
    messages.Pixels(1, 0),
    messages.Filled(1),
    messages.Failed(2, 1, "its checksum is wrong", "bee/1.jpg"),
    messages.Ping(),
    messages.Pong(),
    messages.StatusQuery(),
    messages.Status(
        messages.PROTOCOL,
        INSTANCE,
        "0.1.0",
        "tcp://127.0.0.1:5555",
        1.5,
        2**24,
        {"train": "0" * 32},
        (),
        (),
        0,
        0,
        0,
        0,
    ),
    messages.UnknownClient(),
    messages.Refused(messages.PROTOCOL, "it has 256 clients already"),
    messages.Bye(),
)
"""A client connects, receives one slice, learns of a bad record, asks for the status, is forgotten, and leaves."""

COLUMNS: Final = 112
LONG_RUN: Final = 64
"""Shortest run of zero bytes that is written as a count: the mean image here has 786,432 of them."""


def to_text(frame: bytes) -> str:
    """Return a frame's bytes in hexadecimal, with a long run of zeros as ``(00 x count)``."""
    parts = re.split(rb"(\x00{%d,})" % LONG_RUN, frame)  # the group makes runs of zeros the odd parts
    return "".join(f"(00 x {len(part)})" if at % 2 else part.hex() for at, part in enumerate(parts))


def from_text(text: str) -> bytes:
    """Return the bytes that :func:`to_text` wrote, over any number of lines."""
    # White space goes first, so runs may be wrapped too.
    runs = re.sub(r"\(00x(\d+)\)", lambda run: "00" * int(run[1]), re.sub(r"\s", "", text))
    return bytes.fromhex(runs)


def lines() -> list[str]:
    """Return the lines of the transcript, as docs/design/protocol.md has them."""
    shown = []
    for message in TRANSCRIPT:
        # Ping and Pong belong to both sides and are shown as the client's.
        who = "node" if isinstance(message, FromNode) and not isinstance(message, FromClient) else "client"
        shown.append(f"{who}: {type(message).__name__}")
        shown += textwrap.wrap(
            to_text(messages.encode(message)), COLUMNS, initial_indent="    ", subsequent_indent="    "
        )
    return shown


@click.command()
def main() -> None:
    """Print one message of each type, with its bytes."""
    click.echo("\n".join(lines()))


if __name__ == "__main__":
    main(prog_name="python -m tools.transcript")
