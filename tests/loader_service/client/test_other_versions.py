"""Tests of nodes of other versions: they are refused by name before any request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq

from loader_service import Loader, describe, errors, status
from loader_service.types import BUILTIN_GOLDEN, Installation
from loader_service.wire import messages, sockets

WELCOME = messages.Welcome(messages.PROTOCOL, "0" * 32, 1, 1 << 24, Installation(BUILTIN_GOLDEN, {}), {})
NEWER = messages.PROTOCOL + 1

Ask = Callable[[str], object]


def _loader(address: str) -> object:
    return Loader(address, timeout_s=20, insecure=True)


def _describe(address: str) -> object:
    return describe(address, insecure=True)


@contextmanager
def node(answer: bytes) -> Iterator[str]:
    """Play a node that sends this answer to the first message; yield its address."""
    context: zmq.Context[Any] = zmq.Context()
    router, address = sockets.bind_node(context, "tcp://127.0.0.1:*")

    def play() -> None:
        if router.poll(20_000):
            client, _ = router.recv_multipart()
            router.send_multipart([client, answer])

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield address
    finally:
        thread.join()
        router.close()
        context.term()


@pytest.mark.parametrize("ask", [_loader, _describe])
@pytest.mark.parametrize(
    "answer",
    [
        messages.encode(msgspec.structs.replace(WELCOME, protocol=NEWER)),
        msgspec.msgpack.encode({"t": "welcome", "protocol": NEWER, "splits": [], "something": "new"}),
    ],
    ids=["of one shape", "of another shape"],
)
def test_a_node_of_another_protocol_version_is_refused(ask: Ask, answer: bytes) -> None:
    """The error names the node, its version and the one that this client needs, even if the message cannot be read."""
    with (
        node(answer) as address,
        pytest.raises(errors.NodeRefused, match=f"{address}.*protocol version is {NEWER}.*needs {messages.PROTOCOL};"),
    ):
        ask(address)


def test_the_status_of_another_protocol_version_is_refused() -> None:
    """A status of another version is refused as a Welcome is."""
    with (
        node(msgspec.msgpack.encode({"t": "status", "protocol": NEWER, "mood": "good"})) as address,
        pytest.raises(errors.NodeRefused, match=f"protocol version is {NEWER}"),
    ):
        status(address, insecure=True)


@pytest.mark.parametrize("ask", [_loader, _describe])
def test_a_node_that_makes_other_samples_is_refused(ask: Ask) -> None:
    """Even the first node is refused, since the client knows the right hash of the built-in pictures."""
    other = Installation("f" * 32, {"numpy": "9.9", "simplejpeg": "0.1"})
    with (
        node(messages.encode(msgspec.structs.replace(WELCOME, installation=other))) as address,
        pytest.raises(
            errors.NodeRefused, match=f"is f{{32}}.*needs {BUILTIN_GOLDEN}.*numpy 9.9, simplejpeg 0.1"
        ) as caught,
    ):
        ask(address)
    assert caught.value.exit_code == 4
