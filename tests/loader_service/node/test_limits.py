"""Tests of what clients can take from a node: memory of requests, descriptors, notices, and the patience of the others."""

from __future__ import annotations

import resource
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import zmq

from loader_service import Loader, LocalNode, View, status
from loader_service.local_node import PROGRAM
from loader_service.node.dispatcher import MAX_CLIENTS
from loader_service.types import MAX_EXCLUDED, SliceId
from loader_service.wire import messages, sockets

StartNode = Callable[..., Any]
Eventually = Callable[[Callable[[], bool], str], None]
ROOT = Path(__file__).parent.parent.parent.parent
ALLOWED_BYTES = 64 * 2**20
VIEW = View(crop=8, flip=False, jitter=0.0, basis=(0.0,) * 9)


def _largest_request(instance: str, number: int) -> bytes:
    """Return a request with as many exclusions as a client may send, other ones for each number."""
    # 256 records are excluded by no view of 300, so the node would make it; the positions are those of a large dataset.
    excluded = tuple(range(2**40 + number, 2**40 + number + MAX_EXCLUDED))
    what = SliceId(VIEW, 0, 0, 0, 1, excluded)
    return messages.encode(messages.Request(instance, number, "train", what, "uint8"))


@pytest.mark.parametrize("clients", [4, 16])
def test_a_flood_of_the_largest_requests_costs_little_memory(
    start_node: StartNode, tmp_path: Path, eventually: Eventually, clients: int
) -> None:
    """Clients that send requests without end get refusals with the reason, and an honest client gets its epoch."""
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    dispatcher = psutil.Process(node.process.pid)
    with Loader(node.address, timeout_s=20) as loader:
        assert sum(len(batch.labels) for batch in loader) == 300
    instance = status(node.address).instance
    frames = [_largest_request(instance, number) for number in range(64)]
    before, peak = dispatcher.memory_info().rss, 0
    context: zmq.Context[Any] = zmq.Context()
    stop, refused = threading.Event(), threading.Event()

    def flood() -> None:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.SNDHWM = 100
        dealer.connect(node.address)
        dealer.send(messages.encode(messages.Hello(messages.PROTOCOL, "flood")))
        number = 0
        while not stop.is_set():
            if dealer.poll(20, zmq.POLLOUT):
                dealer.send(frames[number % 64])
                number += 1
            while dealer.poll(0):
                frame = dealer.recv_multipart()[0]
                if b"waiting requests take" in frame:
                    refused.set()
        dealer.close()

    threads = [threading.Thread(target=flood) for _ in range(clients)]
    try:
        for thread in threads:
            thread.start()
        eventually(refused.is_set, "a flood meets the bound")
        with Loader(node.address, timeout_s=60, batch_size=100, prefetch=2) as loader:
            for batch in loader:
                assert len(batch.labels) == 100
                peak = max(peak, dispatcher.memory_info().rss)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        context.term()
    assert peak - before < ALLOWED_BYTES


def test_an_honest_client_never_meets_the_bound(start_node: StartNode, caplog: pytest.LogCaptureFixture) -> None:
    """A client with the most batches ahead, the smallest slices and hundreds of exclusions is refused nothing."""
    node = start_node(workers=2)
    with Loader(node.address, view=VIEW, batch_size=1, prefetch=1024, timeout_s=20, transport="tcp") as loader:
        state = loader.state_dict()
    state["exclusions"] = list(range(1, 299))
    with Loader(node.address, view=VIEW, batch_size=1, prefetch=1024, timeout_s=20, transport="tcp") as loader:
        loader.load_state_dict(state)
        assert sum(len(batch.labels) for batch in loader) == 300
    assert status(node.address).refused == 0
    assert caplog.text == ""


# One piece for each 4 KiB: a batch of 64 then takes 2,352 messages, as slices for a node of a hundred workers do.
SMALL_PIECES = "import sys; import loader_service.node.send_buffers as s; s.PIECE_BYTES = 4096; from loader_service.cli import main; main(prog_name='loader-service')"  # fmt: skip


class SlowLink:
    """A TCP relay to a port of this machine, with a limited rate to the client."""

    def __init__(self, target: int, rate_bytes_s: float) -> None:
        self._target, self._rate = target, rate_bytes_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            node = socket.socket()
            node.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # else megabytes fit into the link itself
            node.connect(("127.0.0.1", self._target))
            for source, sink, rate in ((client, node, 0.0), (node, client, self._rate)):
                threading.Thread(target=self._pump, args=(source, sink, rate), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, rate: float) -> None:
        pause = threading.Event()
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if rate:
                    pause.wait(len(data) / rate)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_large_slices_on_a_slow_link_are_not_asked_again(dataset_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of messages may wait for a client that reads slowly: it is neither forgotten nor asks twice."""
    program = (sys.executable, "-c", SMALL_PIECES)
    with LocalNode(dataset_dir, workers=2, bind="tcp://127.0.0.1:*", program=program, options=("--insecure",)) as node:
        link = SlowLink(urlsplit(node.address).port or 0, 20e6)
        try:
            with Loader(
                link.address, batch_size=64, prefetch=4, transport="tcp", connections=1, timeout_s=60, insecure=True
            ) as loader:
                assert sum(len(batch.labels) for batch in loader) == 300
                (account,) = loader.ledger
        finally:
            link.close()
    assert (account.reassigned, account.duplicates_refused) == (0, 0)
    assert "lost" not in caplog.text


def test_an_unknown_client_is_told_once(node_address: str) -> None:
    """However many requests come from a client that the node does not know, one notice tells it to say Hello."""
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    try:
        dealer.connect(node_address)
        for number in range(50):
            dealer.send(_largest_request("0" * 32, number))
        dealer.send(messages.encode(messages.StatusQuery()))
        kinds = []
        while messages.Status not in kinds:
            assert dealer.poll(20_000)
            kinds.append(type(messages.decode_from_node(dealer.recv_multipart()[0])))
        assert kinds == [messages.UnknownClient, messages.Status]
    finally:
        dealer.close()
        context.term()


OPEN_FILES = 64
"""The limit of the node's open files in the next test, soft and hard."""


@pytest.mark.parametrize("peers", ["raw", "zeromq"])
def test_a_lack_of_descriptors_is_survived(
    dataset_dir: Path, tmp_path: Path, eventually: Eventually, peers: str
) -> None:
    """With 80 idle connections and 64 files a node idles, says once what to do, replaces workers, and serves again."""
    log = tmp_path / "log"
    limited = ("prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}", *PROGRAM)
    context: zmq.Context[Any] = zmq.Context()
    with (
        LocalNode(
            dataset_dir, workers=1, bind="tcp://127.0.0.1:*", program=limited, options=("--insecure",), log=log
        ) as node,
        Loader(node.address, timeout_s=20, epochs=4, batch_size=50, insecure=True) as loader,
        ExitStack() as idle,
    ):
        dispatcher = psutil.Process(node.pid)
        assert resource.prlimit(node.pid, resource.RLIMIT_NOFILE) == (OPEN_FILES, OPEN_FILES)
        batches = loader.all_epochs()
        next(batches)
        port = urlsplit(node.address).port
        for _ in range(80):
            if peers == "raw":
                idle.enter_context(socket.create_connection(("127.0.0.1", port)))
            else:
                dealer = idle.enter_context(context.socket(zmq.DEALER))
                dealer.linger = 0
                dealer.reconnect_ivl = 1000
                dealer.connect(node.address)
        eventually(lambda: "ulimit -n" in log.read_text(), "the node says what is wrong")
        # It does its work meanwhile, also what needs descriptors.
        for worker in dispatcher.children(recursive=True):
            if not worker.children():
                worker.kill()
        for _ in range(10):
            next(batches)
        used = sum(dispatcher.cpu_times()[:2])
        threading.Event().wait(0.5)
        assert sum(dispatcher.cpu_times()[:2]) - used < 0.25
        idle.close()
        assert status(node.address, timeout_s=20, insecure=True).restarts >= 1
        assert sum(len(batch.labels) for batch in batches) == 4 * 300 - 11 * 50
        assert dispatcher.is_running()
    context.term()
    assert log.read_text().count("ulimit -n") == 1
    assert "Traceback" not in log.read_text()


def test_a_node_raises_its_limit_of_open_files(dataset_dir: Path) -> None:
    """A soft limit below the hard one, as shells set it, does not bind a node."""
    limited = ("prlimit", "--nofile=64:2048", *PROGRAM)
    with LocalNode(dataset_dir, workers=1, program=limited) as node:
        assert resource.prlimit(node.pid, resource.RLIMIT_NOFILE) == (2048, 2048)


def test_the_bounds_are_those_that_the_node_prints(node_address: str) -> None:
    """The memory of a client's requests is the sum of what the scheduler queues and what libzmq holds."""
    unread = sockets.UNREAD_REQUESTS * messages.MAX_CLIENT_MESSAGE_BYTES * messages.MAX_CONNECTIONS
    assert unread == 2**20
    assert status(node_address).max_clients == MAX_CLIENTS
