"""One question to one node, for those who need no batches: what do you serve, how are you."""

from __future__ import annotations

import secrets
import time
from typing import Any

import zmq

from loader_service import defaults
from loader_service.client.loader import Dataset
from loader_service.errors import MessageError, NodeRefused, NoNodeError
from loader_service.link import messages, sockets
from loader_service.spec import Split


def describe(address: str = defaults.ADDRESS, split: Split = "train", timeout_s: float = 5.0) -> Dataset:
    """What a node serves.

    Raises:
        NoNodeError: nobody answered in time.
        NodeRefused: it does not serve that split.
        AddressError, MessageError: the address, or who answers there, is of another kind.
    """
    welcome = _ask(address, messages.Hello(messages.PROTOCOL, "query"), timeout_s)
    if not isinstance(welcome, messages.Welcome):
        raise MessageError(f"{address} answered a Hello with {type(welcome).__name__}")
    if split not in welcome.splits:
        raise NodeRefused(address, "list of splits", split, ", ".join(welcome.splits))
    return Dataset.of(welcome.splits[split])


def status(address: str = defaults.ADDRESS, timeout_s: float = 5.0) -> messages.Status:
    """How a node is.

    Raises:
        NoNodeError: nobody answered in time.
        AddressError, MessageError: the address, or who answers there, is of another kind.
    """
    answer = _ask(address, messages.StatusQuery(), timeout_s)
    if not isinstance(answer, messages.Status):
        raise MessageError(f"{address} answered a status query with {type(answer).__name__}")
    return answer


def _ask(address: str, question: messages.FromClient, timeout_s: float) -> messages.FromNode:
    context: zmq.Context[Any] = zmq.Context()
    dealer = None
    try:
        dealer = sockets.connect_client(context, address, secrets.token_bytes(16))
        deadline = time.monotonic() + timeout_s
        if dealer.poll(int(timeout_s * 1000), zmq.POLLOUT):
            dealer.send(messages.encode(question))
            if dealer.poll(max(0, int((deadline - time.monotonic()) * 1000)), zmq.POLLIN):
                answer = messages.decode_from_node(dealer.recv())
                dealer.send(messages.encode(messages.Bye()), zmq.DONTWAIT)
                return answer
        raise NoNodeError((address,), timeout_s)
    finally:
        if dealer is not None:
            dealer.close(linger=sockets.BYE_LINGER_MS)
        context.term()
