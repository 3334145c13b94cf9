"""What a client demands of a node before it asks for anything: the same protocol, and the same bytes as from all others."""

from __future__ import annotations

from loader_service.errors import NodeRefused
from loader_service.types import BUILTIN_GOLDEN, DatasetFacts, Split
from loader_service.wire import messages


def check_welcome(
    address: str, welcome: messages.Welcome, split: Split, first: DatasetFacts | None = None
) -> DatasetFacts:
    """The facts of the split that is wanted.

    Args:
        address: the node's.
        welcome: what it answered.
        split: which it must serve.
        first: of the node that was the first; every other must serve the same. None if this is the first.

    Raises:
        NodeRefused: it speaks another protocol, does not serve the split, or would give other bytes.
    """
    check_protocol(address, welcome.protocol)
    made = welcome.installation
    if made.golden != BUILTIN_GOLDEN:
        raise NodeRefused(
            address,
            "golden hash of the built-in pictures",
            BUILTIN_GOLDEN,
            made.golden,
            f"it would make other samples, with {made}: install the versions there that constraints.txt names",
        )
    facts = welcome.splits.get(split)
    if facts is None:
        raise NodeRefused(address, "list of splits", split, ", ".join(welcome.splits) or "empty")
    for what in ("fingerprint", "golden"):
        need, have = getattr(first or facts, what), getattr(facts, what)
        if need != have:
            raise NodeRefused(address, f"dataset's {what}", need, have)
    return facts


def check_protocol(address: str, version: int | None) -> None:
    """Refuse a node of another protocol version; None is that of a message that states none.

    Raises:
        NodeRefused: it is another.
    """
    if version not in (None, messages.PROTOCOL):
        raise NodeRefused(
            address,
            "protocol version",
            messages.PROTOCOL,
            version,
            "install the same release of loader-service at both ends",
        )
