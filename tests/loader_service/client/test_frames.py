"""Tests of slices in frames: pieces arrive in their slot, and a node that sends wrong ones is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from loader_service import Loader, View, errors
from loader_service.types import BUILTIN_GOLDEN, DRAWS, DatasetFacts, Installation
from loader_service.wire import messages, sockets

SIDE = 32
COUNT = 4
INSTANCE = "0" * 32
PIXELS = bytes(np.arange(COUNT * SIDE * SIDE * 3, dtype=np.uint32).astype(np.uint8))
TAIL = np.arange(COUNT, dtype=np.int64).tobytes() + bytes(COUNT * DRAWS.itemsize)
HALF = len(PIXELS) // 2

Messages = list[list[bytes]]


def answer(number: int) -> Messages:
    """Return the right answer to a request: two pieces and the end."""
    return [
        [messages.encode(messages.Pixels(number, 0)), PIXELS[:HALF]],
        [messages.encode(messages.Pixels(number, HALF)), PIXELS[HALF:]],
        [messages.encode(messages.Filled(number)), TAIL],
    ]


@contextmanager
def node(answers: Callable[[int], Messages]) -> Iterator[str]:
    """Play a node that sends these answers to each request; yield its address."""
    mean = bytes(256 * 256 * 3 * 4)
    facts = DatasetFacts(COUNT, ("a",) * COUNT, mean, (0.0,) * 3, (1.0,) * 3, (1.0,) * 9, INSTANCE, INSTANCE)
    made = Installation(BUILTIN_GOLDEN, {})
    welcome = messages.encode(messages.Welcome(messages.PROTOCOL, INSTANCE, 1, 1 << 24, made, {"train": facts}))
    context: zmq.Context[Any] = zmq.Context()
    router, address = sockets.bind_node(context, "tcp://127.0.0.1:*")
    ended = threading.Event()

    def play() -> None:
        while not ended.is_set():
            if not router.poll(50):
                continue
            client, frame = router.recv_multipart()
            match messages.decode_from_client(frame):
                case messages.Hello():
                    router.send_multipart([client, welcome])
                case messages.Request(id=number):
                    for frames in answers(number):
                        router.send_multipart([client, *frames])

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield address
    finally:
        ended.set()
        thread.join()
        router.close()
        context.term()


def load(address: str, timeout_s: float) -> tuple[bytes, list[int]]:
    """Return the pixels and labels of the only batch."""
    view = View(crop=SIDE, flip=False, jitter=0.0, basis=(0.0,) * 9)
    with Loader(
        address, view=view, batch_size=COUNT, epochs=1, transport="tcp", timeout_s=timeout_s, insecure=True
    ) as loader:
        batch = next(loader.all_epochs())
        return batch.images.tobytes(), batch.labels.tolist()


def test_pieces_make_a_slice() -> None:
    """Pieces and the tail make a batch."""
    with node(answer) as address:
        assert load(address, 20) == (PIXELS, list(range(COUNT)))


def test_pieces_of_a_request_that_nobody_made_change_nothing() -> None:
    """A late answer to an earlier request is ignored."""
    with node(lambda number: [*answer(number + 1000), *answer(number)]) as address:
        assert load(address, 20) == (PIXELS, list(range(COUNT)))


@pytest.mark.parametrize(
    "order",
    [(1, 0, 2), (0, 0, 2), (0, 2), (2,), (0, 1, 1)],
    ids=["the second piece first", "a piece twice", "a piece missing", "no piece", "more than a slice"],
)
def test_wrong_pieces_lose_their_node(order: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the node, and no batch is made of these pieces."""
    with node(lambda number: [answer(number)[i] for i in order]) as address, caplog.at_level(logging.WARNING):
        with pytest.raises(errors.NoNodeError):
            load(address, 1)
        assert f"node {address} is lost: it does not speak this protocol" in caplog.text


def test_a_frame_too_many_loses_its_node(caplog: pytest.LogCaptureFixture) -> None:
    """A piece with two frames is refused."""
    with node(lambda number: [[*answer(number)[0], b""]]) as address, caplog.at_level(logging.WARNING):
        with pytest.raises(errors.NoNodeError):
            load(address, 1)
        assert f"node {address} is lost: it does not speak this protocol" in caplog.text
