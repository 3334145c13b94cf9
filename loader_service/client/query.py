"""One question to one node, without a loader: describe its dataset, or ask for its status."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import zmq

from loader_service import defaults
from loader_service.client.dataset import Dataset
from loader_service.client.protocol import check_protocol, check_welcome
from loader_service.errors import MessageError, NodeFull, NoNodeError
from loader_service.types import Split
from loader_service.wire import messages, sockets
from loader_service.wire.access import Access, access


def describe(
    address: str = defaults.ADDRESS,
    split: Split = "train",
    timeout_s: float = 5.0,
    *,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
    insecure: bool = False,
) -> Dataset:
    """Return the facts of the dataset that a node serves. The keys are those of :class:`~loader_service.Loader`.

    Raises:
        NoNodeError: no node answered in time.
        NodeRefused: the node does not serve that split, or would give other bytes than this version must have.
        NodeFull: the node takes no more clients.
        AddressError, MessageError, KeyRefused, KeyFileError: there is no such address, or another service answers there.
    """
    keys = access([address], server_key, client_key, insecure=insecure)
    welcome = _ask(address, messages.Hello(messages.PROTOCOL, "query"), timeout_s, keys)
    if not isinstance(welcome, messages.Welcome):
        raise MessageError(f"{address} answered a Hello with {type(welcome).__name__}")
    return Dataset.of(check_welcome(address, welcome, split))


def status(
    address: str = defaults.ADDRESS,
    timeout_s: float = 5.0,
    *,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
    insecure: bool = False,
) -> messages.Status:
    """Return a node's status: its workers, clients, queues and counters. The keys are those of a Loader.

    Raises:
        NoNodeError: no node answered in time.
        NodeRefused: the node speaks another version of the protocol.
        AddressError, MessageError, KeyRefused, KeyFileError: there is no such address, or another service answers there.
    """
    keys = access([address], server_key, client_key, insecure=insecure)
    answer = _ask(address, messages.StatusQuery(), timeout_s, keys)
    if not isinstance(answer, messages.Status):
        raise MessageError(f"{address} answered a status query with {type(answer).__name__}")
    check_protocol(address, answer.protocol)
    return answer


def _ask(address: str, question: messages.FromClient, timeout_s: float, keys: Access) -> messages.FromNode:
    """Connect, send a question and return the first answer."""
    context: zmq.Context[Any] = zmq.Context()  # not shared: term() below would wait for a loader's sockets
    dealer, monitor = sockets.connect_client(context, address, secrets.token_bytes(16), keys.keys_for(address))
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    poller.register(monitor.socket, zmq.POLLIN)
    deadline = time.monotonic() + timeout_s
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            poller.poll(int(left_s * 1000) + 1)  # rounded up, so that the last millisecond does not spin
            if any(monitor.events()):  # connected, or connected again: the first question may be lost
                # Without waiting: if the connection is cut again already, its next event sends the question.
                sockets.try_send(dealer, [messages.encode(question)])
            if dealer.poll(0):
                frame = dealer.recv()
                sockets.try_send(dealer, [messages.encode(messages.Bye())])  # the node forgets this client at once
                return _accepted(address, _decode(address, frame))
        raise NoNodeError((address,), timeout_s)
    finally:
        monitor.close()
        dealer.close(linger=sockets.BYE_LINGER_MS)
        context.term()  # waits for the Bye, at most BYE_LINGER_MS


def _accepted(address: str, answer: messages.FromNode) -> messages.FromNode:
    if isinstance(answer, messages.Refused):
        check_protocol(address, answer.protocol)
        raise NodeFull(address, answer.reason)
    return answer


def _decode(address: str, frame: bytes) -> messages.FromNode:
    try:
        return messages.decode_from_node(frame)
    except MessageError:  # a node of another version is refused by its version, which is the better error
        check_protocol(address, messages.protocol_of(frame))
        raise
