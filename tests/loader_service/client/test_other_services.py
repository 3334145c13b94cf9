"""Tests of addresses where no node of this protocol serves: the others serve, or the error names what is there."""

from __future__ import annotations

import http.server
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from loader_service import Loader, describe, errors, status
from loader_service.node.dispatcher import MAX_CLIENTS
from loader_service.types import BUILTIN_GOLDEN, DatasetFacts, Installation
from loader_service.wire import messages, sockets

NEWER = messages.PROTOCOL + 1
TIMEOUT_S = 20


@contextmanager
def raw(answer: bytes) -> Iterator[str]:
    """Play a service that sends these bytes to each connection and then closes it; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def play() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                connection.sendall(answer)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


@contextmanager
def zeromq(kind: int, answer: bytes = b"") -> Iterator[str]:
    """Play a ZeroMQ socket of a kind, which gives this answer to each message if it is a ROUTER; yield its address."""
    context: zmq.Context[Any] = zmq.Context()
    peer = context.socket(kind)
    peer.linger = 0
    port = peer.bind_to_random_port("tcp://127.0.0.1")
    ended = threading.Event()

    def play() -> None:
        while not ended.is_set():
            if kind == zmq.ROUTER and peer.poll(20):
                peer.send_multipart([peer.recv_multipart()[0], answer])

    thread = threading.Thread(target=play if kind == zmq.ROUTER else lambda: None)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join()
        peer.close()
        context.term()


@contextmanager
def web_server() -> Iterator[str]:
    """Play a web server; yield its address."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


OTHER_WELCOME = messages.encode(
    messages.Welcome(messages.PROTOCOL, "0" * 32, 1, 1 << 24, Installation("f" * 32, {"numpy": "9.9"}), {})
)
STRANGERS: dict[str, tuple[Callable[[], Any], type[errors.LinkError], str]] = {
    "a web server's answer": (
        lambda: raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        errors.AddressError,
        r"a service that answers b'HTTP/1\.1 400.* listens there, not a node",
    ),
    "garbage": (
        lambda: raw(bytes(range(1, 200)) * 20),
        errors.LinkError,
        "listens there, not a node|sent what no node",
    ),
    "a publisher": (lambda: zeromq(zmq.PUB), errors.AddressError, "a ZeroMQ socket of type PUB listens there"),
    "rubbish": (
        lambda: zeromq(zmq.ROUTER, b"\x81\xa1t\xa4what"),
        errors.MessageError,
        "sent what no node of this protocol",
    ),
    "an older version": (
        lambda: zeromq(zmq.ROUTER, msgspec.msgpack.encode({"t": "welcome", "protocol": 1})),
        errors.NodeRefused,
        "protocol version is 1.*the node is older: upgrade it first",
    ),
    "a newer version": (
        lambda: zeromq(zmq.ROUTER, messages.encode(messages.Refused(NEWER, "it is newer"))),
        errors.NodeRefused,
        "the client is older: upgrade it to the node's release",
    ),
    "other samples": (lambda: zeromq(zmq.ROUTER, OTHER_WELCOME), errors.NodeRefused, f"needs {BUILTIN_GOLDEN}"),
    "a full node": (
        lambda: zeromq(zmq.ROUTER, messages.encode(messages.Refused(messages.PROTOCOL, "it has 256 clients already"))),
        errors.NodeFull,
        "is full: it has 256 clients already",
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_the_run_goes_on_with_the_good_one(node_address: str, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """A warning names the address that does not serve and what is there; every sample comes from the other."""
    play, _, sentence = STRANGERS[what]
    with (
        play() as other,
        caplog.at_level(logging.WARNING),
        Loader(f"{other},{node_address}", timeout_s=TIMEOUT_S, epochs=10_000, insecure=True) as loader,
    ):
        batches = loader.all_epochs()
        for batch in batches:
            assert len(batch.labels)
            if re.search(sentence, caplog.text):
                break
        assert sum(len(next(batches).labels) for _ in range(3)) > 0
    assert re.search(f"{other}.*({sentence})", caplog.text)


@pytest.mark.parametrize("what", STRANGERS)
def test_the_only_address_gives_the_error(what: str) -> None:
    """Without another address the error says what is there, long before the timeout."""
    play, kind, sentence = STRANGERS[what]
    with play() as address, pytest.raises(kind, match=sentence) as caught:
        Loader(address, timeout_s=TIMEOUT_S, insecure=True)
    assert caught.value.exit_code == 4
    assert not isinstance(caught.value, errors.NoNodeError)


def test_a_mute_service_is_waited_for_and_the_run_goes_on(node_address: str) -> None:
    """A web server that waits for a request looks like a node that is not there yet."""
    with web_server() as other, Loader(f"{other},{node_address}", timeout_s=TIMEOUT_S, insecure=True) as loader:
        assert sum(len(batch.labels) for batch in loader) == 300


def _talk(address: str, *frames: bytes) -> list[dict[str, Any]]:
    """Send frames as one client; return the node's answers until none comes for a while, as plain maps."""
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    try:
        dealer.connect(address)
        for frame in frames:
            dealer.send(frame)
        answers = []
        while dealer.poll(500 if answers else 10_000):
            answers.append(msgspec.msgpack.decode(dealer.recv_multipart()[0]))
        return answers
    finally:
        dealer.close()
        context.term()


@pytest.mark.parametrize("version", [1, messages.PROTOCOL - 1, NEWER])
def test_a_client_of_another_version_is_refused(node_address: str, version: int) -> None:
    """The node's answer has the fields by which every version since 0.1.0 reads another one, and says what to do."""
    before = len(status(node_address).clients)
    hello = {"t": "hello", "protocol": version, "client": "me"} | ({"mood": "good"} if version == NEWER else {})
    (answer,) = _talk(node_address, msgspec.msgpack.encode(hello))
    # Versions 1 to 5 look for these two in what they cannot decode, and report the version.
    assert isinstance(answer["t"], str)
    assert answer["protocol"] == messages.PROTOCOL
    older = "the node is older: upgrade it first" if version > messages.PROTOCOL else "the client is older: upgrade it"
    assert older in answer["reason"]
    assert len(status(node_address).clients) == before


def _plain(message: messages.FromNode) -> Any:
    return msgspec.msgpack.decode(messages.encode(message))


def test_what_a_newer_node_adds_is_ignored() -> None:
    """Fields of Welcome, Status and their parts that a client does not know do not disturb it."""

    def grown(value: Any, field: str = "") -> Any:
        if isinstance(value, dict):
            more = {} if field in ("libraries", "splits") else {"unknown": 1}  # these two are maps, not messages
            return more | {key: grown(item, key) for key, item in value.items()}
        return [grown(item) for item in value] if isinstance(value, list | tuple) else value

    mean = bytes(256 * 256 * 3 * 4)
    facts = DatasetFacts(4, ("a",) * 4, mean, (0.0,) * 3, (1.0,) * 3, (1.0,) * 9, "0" * 32, "0" * 32)
    made = Installation(BUILTIN_GOLDEN, {"numpy": "2"})
    welcome = messages.Welcome(messages.PROTOCOL, "0" * 32, 1, 1, made, {"train": facts})
    assert messages.decode_from_node(msgspec.msgpack.encode(grown(_plain(welcome)))) == welcome
    worker = messages.WorkerStatus(1, messages.WorkerState.IDLE, 0, 0, 0.0)
    client = messages.ClientStatus("me", "tcp", 0, 0, 0)
    answer = messages.Status(
        messages.PROTOCOL, "0" * 32, "9", "a", 0.0, 0, {"train": "f"}, (worker,), (client,), *[0] * 4
    )
    assert messages.decode_from_node(msgspec.msgpack.encode(grown(_plain(answer)))) == answer
    with pytest.raises(errors.MessageError):
        messages.decode_from_client(
            msgspec.msgpack.encode({"t": "hello", "protocol": messages.PROTOCOL, "client": "", "x": 1})
        )


def test_a_full_node_says_so(start_node: Callable[..., Any], tmp_path: Path) -> None:
    """Loader and describe raise NodeFull, status and its text say it, and a second node serves; a place freed is taken."""
    full, other = start_node(bind=f"ipc://{tmp_path}/full"), start_node()
    context: zmq.Context[Any] = zmq.Context()
    dealers = []
    try:
        for _ in range(MAX_CLIENTS):
            dealers.append(context.socket(zmq.DEALER))
            dealers[-1].connect(full.address)
            dealers[-1].send(messages.encode(messages.Hello(messages.PROTOCOL, "another")))
        for dealer in dealers:
            assert dealer.poll(20_000)
        for ask in (lambda: Loader(full.address, timeout_s=TIMEOUT_S), lambda: describe(full.address)):
            with pytest.raises(errors.NodeFull, match=f"is full: it has {MAX_CLIENTS} clients already"):
                ask()
        answer = status(full.address)
        assert len(answer.clients) == answer.max_clients == MAX_CLIENTS
        with Loader(f"{full.address},{other.address}", timeout_s=TIMEOUT_S) as loader:
            assert sum(len(batch.labels) for batch in loader) == 300
        sockets.try_send(dealers[0], [messages.encode(messages.Bye())])
        with Loader(f"{full.address},tcp://127.0.0.1:9", timeout_s=TIMEOUT_S, insecure=True) as loader:
            assert sum(len(batch.labels) for batch in loader) == 300
    finally:
        for dealer in dealers:
            dealer.close(linger=0)
        context.term()


def test_a_question_never_outlasts_its_timeout() -> None:
    """A service that takes connections and cuts them at once does not hold a question beyond its timeout."""
    with raw(os.urandom(0)) as address, pytest.raises(errors.NoNodeError, match=r"within 0\.3 s"):
        describe(address, timeout_s=0.3, insecure=True)
