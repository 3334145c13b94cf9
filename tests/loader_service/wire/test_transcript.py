"""The transcript in docs/design/protocol.md, compared with the bytes that the code sends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from loader_service.wire import messages
from tools.transcript import TRANSCRIPT, from_text, lines

DOCUMENT = Path(__file__).parent.parent.parent.parent / "docs" / "design" / "protocol.md"


def _block() -> str:
    """Return the document's transcript."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Transcript\n", 1)[1]
    return section.split("```")[1].partition("\n")[2]


def test_every_type_of_message_is_shown() -> None:
    """The transcript has each type of message of clients and nodes once."""
    kinds = {*get_args(messages.FromClient), *get_args(messages.FromNode)}
    assert {type(message) for message in TRANSCRIPT} == kinds
    assert len(TRANSCRIPT) == len(kinds)


def test_the_documents_bytes_are_those_on_the_wire() -> None:
    """Each message encodes to the bytes in the document, and these decode to the message."""
    shown = re.findall(r"^(client|node): (\w+)\n((?: {4}.+\n)+)", _block(), re.MULTILINE)
    assert [name for _, name, _ in shown] == [type(message).__name__ for message in TRANSCRIPT]
    for (who, _, text), message in zip(shown, TRANSCRIPT, strict=True):
        frame = from_text(text)
        decode = messages.decode_from_client if who == "client" else messages.decode_from_node
        assert messages.encode(message) == frame
        assert decode(frame) == message


def test_the_document_is_what_the_tool_prints() -> None:
    """The block is the output of `python -m tools.transcript`."""
    assert _block().splitlines() == lines()
