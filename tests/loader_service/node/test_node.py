"""The start, work and end of a node, with real processes."""

from __future__ import annotations

import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from loader_service import Loader, LocalNode, errors, status
from loader_service.node.dispatcher import MAX_CLIENTS
from loader_service.wire import messages

StartNode = Callable[..., Any]
Eventually = Callable[[Callable[[], bool], str], None]


def _epoch(address: str, **options: Any) -> list[bytes]:
    with Loader(address, **{"batch_size": 64, "timeout_s": 20, "epochs": 1} | options) as loader:
        return [batch.images.tobytes() + batch.labels.tobytes() for batch in loader.all_epochs()]


def test_it_says_where_it_listens_what_it_serves_and_what_it_takes(start_node: StartNode) -> None:
    """The announcement of a node names its address, splits, workers and memory ceiling in one line."""
    node = start_node(workers=2)
    assert node.announcement == (
        f"listening on {node.address}: train (300 records, 3 classes), val (60 records, 3 classes); "
        "2 workers; at most 140 MiB of shared memory, and 2 MiB for each client's requests"
    )
    answer = status(node.address)
    assert answer.memory_ceiling_bytes == 140 * 2**20 + 2 * mmap.PAGESIZE  # a bit per record of two splits
    assert [worker.pid for worker in answer.workers] == sorted(p.pid for p in node.workers())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_it_ends_cleanly_in_the_middle_of_work(start_node: StartNode, number: signal.Signals, transport: str) -> None:
    """SIGTERM or SIGINT ends a node within two seconds while it serves a client, and no process remains."""
    node = start_node(workers=2)
    family = node.family
    with Loader(node.address, epochs=1000, timeout_s=20, transport=transport) as loader:
        next(loader.all_epochs())
        assert "/dev/shm/loader-service" not in Path(f"/proc/{node.pid}/maps").read_text()
        start = time.monotonic()
        code, said = node.stop(number)
        assert time.monotonic() - start < 2
    assert code == 0, said
    assert "Traceback" not in said
    assert not any(process.is_running() for process in family)


def test_ctrl_c_in_the_terminal_reaches_all_and_is_still_clean(start_node: StartNode) -> None:
    """SIGINT to the whole process group, as a terminal sends it, ends a node without output."""
    node = start_node(workers=2)
    family = node.family
    os.killpg(node.process.pid, signal.SIGINT)
    code, said = node.stop(signal.SIGINT) if node.process.poll() is None else node.stop()
    assert (code, said) == (0, "")
    assert not any(process.is_running() for process in family)


def test_workers_die_with_a_killed_dispatcher(start_node: StartNode, eventually: Eventually) -> None:
    """SIGKILL of the dispatcher, which then cannot clean up, leaves no process and no segment of the node."""
    node = start_node(workers=3)
    eventually(lambda: len(node.family) == 5, "dispatcher, fork server and three workers run")
    family = node.family
    with Loader(node.address, timeout_s=20, transport="tcp") as loader:
        next(loader.all_epochs())
    assert node.segments() == set()
    node.stop(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_killed_worker_is_replaced_and_its_slices_are_made_again(
    start_node: StartNode, eventually: Eventually
) -> None:
    """SIGKILL of every worker in the middle of an epoch changes no batch, and the status counts the restarts."""
    node = start_node(workers=2)
    undisturbed = _epoch(node.address, epochs=4)
    old = {process.pid for process in node.workers()}
    with Loader(node.address, batch_size=64, epochs=4, timeout_s=20) as loader:
        got = []
        for batch in loader.all_epochs():
            got.append(batch.images.tobytes() + batch.labels.tobytes())
            if len(got) in (3, 9):
                for process in node.workers():
                    process.kill()
    assert got == undisturbed
    assert all((a.delivered, a.expected) == (300, 300) for a in loader.ledger)
    eventually(lambda: len(node.workers()) == 2, "two workers run again")
    assert not old & {process.pid for process in node.workers()}
    assert status(node.address).restarts >= 2


def test_workers_may_die_again_and_again(start_node: StartNode, eventually: Eventually) -> None:
    """The dispatcher handles deaths in either order of their two events: the end of the link, the fork server's report."""
    node = start_node(workers=2)

    def recovered(deaths: int) -> bool:
        now = status(node.address)
        return now.restarts == deaths and all(worker.state == "idle" and worker.pid for worker in now.workers)

    eventually(partial(recovered, 0), "both workers run")
    for deaths in range(2, 41, 2):
        for worker in status(node.address).workers:
            os.kill(worker.pid, signal.SIGKILL)
        eventually(partial(recovered, deaths), "two new workers")
    assert len(_epoch(node.address)) == 5


IMPATIENT = """
from loader_service import defaults
defaults.STALL_WARNING_S, defaults.WORKER_STALL_S = 1.0, 2.0  # before the import of the dispatcher, which reads them
from loader_service.cli import main
main()
"""


def test_it_survives_a_stopped_worker(start_node: StartNode) -> None:
    """A worker under SIGSTOP is killed after WORKER_STALL_S, other workers make its slices, and the log reports both."""
    node = start_node(workers=2, program=(sys.executable, "-c", IMPATIENT))
    undisturbed = _epoch(node.address, epochs=2)
    with Loader(node.address, batch_size=64, epochs=2, timeout_s=40) as loader:
        got = [b.images.tobytes() + b.labels.tobytes() for b in [next(loader.all_epochs())]]
        stopped = node.workers()[0]
        stopped.suspend()
        got += [b.images.tobytes() + b.labels.tobytes() for b in loader.all_epochs()]
    assert got == undisturbed
    _, said = node.stop()
    assert re.search(rf"no progress for 1 s although \d+ slices are requested: worker \d \(pid {stopped.pid}\)", said)
    assert f"(pid {stopped.pid}) ended by signal SIGKILL" in said


def test_it_will_not_start_on_what_it_cannot_serve(tmp_path: Path) -> None:
    """A node without a dataset does not start, and the error says how to make one."""
    with pytest.raises(errors.NodeFailed, match=r"there is no dataset at .*make preprocess"):
        LocalNode(tmp_path)


def test_rubbish_does_not_stop_it(start_node: StartNode, tmp_path: Path) -> None:
    """A node counts and drops the bytes of an unknown peer and continues to serve."""
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.connect(node.address)
        for frames in (
            [b""],
            [b"rubbish"],
            [b"\x81\xa1t\xa5hello"],
            [b"a", b"b", b"c"],
            [b"x" * 10_000],
            [os.urandom(99)],
        ):
            dealer.send_multipart(frames)
        assert len(_epoch(node.address)) == 5
    finally:
        dealer.close(linger=0)
        context.term()
    assert status(node.address).refused == 6


def test_a_client_that_never_reads_costs_no_memory(
    start_node: StartNode, tmp_path: Path, eventually: Eventually
) -> None:
    """Hundreds of Hellos, each with an unread answer of 1.5 MB, do not increase the memory of a node."""
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    dispatcher = psutil.Process(node.process.pid)
    assert len(_epoch(node.address)) == 5
    before = dispatcher.memory_info().rss
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVHWM, 1)
    try:
        dealer.connect(node.address)
        for _ in range(300):
            dealer.send(messages.encode(messages.Hello(messages.PROTOCOL, "rude")))
        dealer.send(b"the end")
        eventually(lambda: status(node.address).refused == 1, "the node has read it all")
        assert dispatcher.memory_info().rss - before < 64 * 2**20
    finally:
        dealer.close(linger=0)
        context.term()


def test_there_is_an_end_to_the_clients_that_a_node_takes(
    start_node: StartNode, tmp_path: Path, eventually: Eventually
) -> None:
    """Hellos of new clients fill the node's list up to MAX_CLIENTS, and a client on the list is still served."""
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Loader(node.address, epochs=2, batch_size=64, timeout_s=20) as loader:
        next(loader.all_epochs())
        dealers = [context.socket(zmq.DEALER) for _ in range(MAX_CLIENTS + 20)]
        try:
            for dealer in dealers:
                dealer.connect(node.address)
                dealer.send(messages.encode(messages.Hello(messages.PROTOCOL, "another")))
            eventually(lambda: status(node.address).refused == 21, "all have said hello")
            assert len(status(node.address).clients) == MAX_CLIENTS
            assert sum(len(batch.labels) for batch in loader.all_epochs()) == 2 * 300 - 64
        finally:
            for dealer in dealers:
                dealer.close(linger=0)
            context.term()
