"""A node of another version is refused by name, before it is asked for anything."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
import zmq

from loader_service import Loader, errors
from loader_service.link import messages, sockets


def test_a_node_of_another_protocol_version_is_refused() -> None:
    """The sentence names the node, its version and the one that this client needs."""
    context: zmq.Context[Any] = zmq.Context()
    router, address = sockets.bind_node(context, "tcp://127.0.0.1:*")
    welcome = messages.Welcome(messages.PROTOCOL, "0" * 32, 1, 1 << 24, {})
    other = msgspec.structs.replace(welcome, protocol=messages.PROTOCOL + 1)

    def answer_hello() -> None:
        if router.poll(20_000):
            client, _ = router.recv_multipart()
            router.send_multipart([client, messages.encode(other)])

    node = threading.Thread(target=answer_hello)
    node.start()
    try:
        with pytest.raises(errors.NodeRefused, match=f"{address}.*protocol version is {messages.PROTOCOL + 1}"):
            Loader(address, timeout_s=20)
    finally:
        node.join()
        router.close()
        context.term()
