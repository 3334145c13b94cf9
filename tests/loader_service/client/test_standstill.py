"""Tests of a node that answers pings and makes nothing: its client reports it and asks another."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from loader_service import Loader, defaults
from loader_service.node.worker import prove, survey
from loader_service.wire import messages, sockets


@pytest.fixture
def mute(dataset_dir: Path) -> Iterator[str]:
    """Play a node that welcomes clients and answers pings, and does nothing else; yield its address."""
    welcome = messages.encode(
        messages.Welcome(messages.PROTOCOL, "0" * 32, 2, defaults.SEND_SLOT_BYTES, prove(), survey(dataset_dir))
    )
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
                case messages.Ping():
                    router.send_multipart([client, messages.encode(messages.Pong())])

    thread = threading.Thread(target=play)
    thread.start()
    yield address
    ended.set()
    thread.join()
    router.close()
    context.term()


def test_another_node_makes_what_it_owes(
    mute: str, node_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The epoch is complete, and one warning names the node, the slices that it owes, and since when."""
    monkeypatch.setattr(defaults, "NODE_STALL_S", 0.5)
    with (
        caplog.at_level(logging.WARNING, "loader_service.client"),
        Loader(f"{mute},{node_address}", transport="tcp", batch_size=30, timeout_s=20, insecure=True) as loader,
    ):
        ids = [number for batch in loader for number in batch.ids.tolist()]
        (account,) = loader.ledger
    assert sorted(ids) == list(range(300))
    (line,) = [
        record.message for record in caplog.records if record.message.startswith(f"node {mute} answers pings, but")
    ]
    assert re.search(
        r"delivered nothing for \d+ s: it owes \d+ slices, the oldest \(positions \d+ to \d+\) for \d+ s", line
    )
    assert line.endswith("other nodes are asked instead")
    assert account.reassigned > 0
