"""The segments of a node's clients: who may attach one, what a segment can do to the node, and when its memory is freed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loader_service import Loader, status
from loader_service.node.dispatcher import CANNOT_ATTACH
from loader_service.types import SliceId, View
from loader_service.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Failed,
    Filled,
    Hello,
    Place,
    Request,
    SlotLayout,
    Welcome,
)
from loader_service.wire.shm import DIRECTORY, PAGE_BYTES, Segment

StartNode = Callable[..., Any]
Connect = Callable[[str], Any]
Eventually = Callable[[Callable[[], bool], str], None]

VIEW = View.named("center")
LAYOUT = SlotLayout(slots=2, batch_size=256, slice_samples=128, image_bytes=224 * 224 * 3, draws_bytes=12)

TOOLS = """
import os, signal, subprocess, sys, time
from pathlib import Path
import psutil
from loader_service import Loader, LocalNode, status

def used():
    room = os.statvfs("/dev/shm")
    return (room.f_blocks - room.f_bfree) * room.f_frsize

def eventually(condition, what, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        os.sched_yield()
"""

LEAVING = (
    TOOLS
    + """
with LocalNode(sys.argv[1], workers=3) as node, Loader(node.address, batch_size=8, epochs=1000) as neighbour:
    next(neighbour.all_epochs())
    before = used()
    for _ in range(8):  # two of them fit at a time
        with Loader(node.address, transport="shm", epochs=10, timeout_s=20) as loader:
            for _ in range(4):
                next(loader.all_epochs())
            assert used() > before
            next(neighbour.all_epochs())
        eventually(lambda: used() == before, "the memory of a loader that left is free")
    with Loader(node.address, transport="shm", epochs=1000, timeout_s=20) as loader:
        for _ in range(20):
            next(loader.all_epochs())
        fork_server = psutil.Process(node.pid).children()[0]
        stopped = fork_server.children()[0]
        stopped.suspend()
    eventually(lambda: len(status(node.address).clients) == 1, "the node has read the goodbye")
    assert used() > before  # one worker has not come to let go of it
    stopped.resume()
    eventually(lambda: used() == before, "the stopped worker has let go, too")
    assert status(node.address).restarts == 0
print("done")
"""
)

TRAINER = """
import sys
from loader_service import Loader
loader = Loader(sys.argv[1], transport="shm", batch_size=64, epochs=1000, timeout_s=20)
batch = next(loader.all_epochs())
print("ready", flush=True)
sys.stdin.readline()
"""

KILLED = (
    TOOLS
    + """
foreign = Path("/dev/shm/loader-service-" + "0" * 32)
for user in sys.argv[3:]:
    foreign.touch()
    os.chown(foreign, int(user), int(user))
with LocalNode(sys.argv[1], workers=2) as node:
    before = used()
    command = [sys.executable, "-c", sys.argv[2], node.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        trainer.stdout.readline()
        assert used() > before
        trainer.kill()
    eventually(lambda: used() == before, "the memory of a killed trainer is free", within_s=5)
    assert status(node.address).clients == ()
assert list(Path("/dev/shm").glob("loader-service-*")) == [foreign] * len(sys.argv[3:])
print("done")
"""
)


def test_loaders_that_leave_take_their_memory_with_them(
    run_with_own_shm: Callable[..., str], dataset_dir: Path
) -> None:
    """Eight default loaders in turn leave /dev/shm as it was; a worker that was stopped lets go when it resumes."""
    # 115 MiB for each default loader, and 13 for the neighbour: a third one would not fit beside two that linger.
    small = "mount -t tmpfs -o size=320m tmpfs /dev/shm"
    assert "done" in run_with_own_shm(LEAVING, str(dataset_dir), mount=small)


def test_a_killed_trainer_leaves_no_memory_behind(run_with_own_shm: Callable[..., str], dataset_dir: Path) -> None:
    """Within seconds of SIGKILL, its node has forgotten it, its segment has no name, and no worker maps it."""
    assert "done" in run_with_own_shm(KILLED, str(dataset_dir), TRAINER)


class Owner:
    """A client with a segment of its own, written by hand."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.segment = Segment.create(LAYOUT.slots * LAYOUT.slot_bytes, LAYOUT.parts)
        welcome = client.ask(Hello(PROTOCOL, "by hand"))
        assert isinstance(welcome, Welcome)
        self.instance = welcome.instance

    @property
    def attach(self) -> Attach:
        """The message that attaches the segment."""
        return Attach(self.segment.name, self.segment.nonce, LAYOUT)

    def request(self, number: int, place: Place, **changes: Any) -> Request:
        """Return a request for 128 samples."""
        what = SliceId(changes.pop("view", VIEW), 0, 0, 0, changes.pop("count", 128))
        return Request(self.instance, number, "train", what, changes.pop("dtype", "uint8"), place)

    def close(self) -> None:
        """Remove the segment."""
        self.segment.unlink()
        self.segment.close()


@pytest.fixture
def owner(connect: Connect) -> Iterator[Callable[[str], Owner]]:
    """``owner(address)`` connects a client that has said Hello and owns a segment."""
    owners: list[Owner] = []

    def made(address: str) -> Owner:
        owners.append(Owner(connect(address)))
        return owners[-1]

    yield made
    for each in owners:
        each.close()


def test_only_the_owner_of_a_segment_can_attach_it(node_address: str, owner: Callable[[str], Owner]) -> None:
    """Another client's name, without its nonce, is refused by the same sentence as a name that does not exist."""
    own, prober = owner(node_address), owner(node_address)
    assert own.client.ask(own.attach) == Attached(own.segment.name, accepted=True)
    for name in (own.segment.name, "loader-service-" + "0" * 32):
        refusal = prober.client.ask(Attach(name, prober.segment.nonce, LAYOUT))
        assert refusal == Attached(name, accepted=False, reason=CANNOT_ATTACH)
    refused = prober.client.ask(prober.request(1, Place(0, 1)))
    assert refused == Failed(1, -1, "no shared memory is attached")


def test_a_slice_is_written_to_its_part_and_nowhere_else(node_address: str, owner: Callable[[str], Owner]) -> None:
    """Requests that would leave their part are refused, and a good one changes no byte outside of its part."""
    own = owner(node_address)
    own.client.ask(own.attach)
    for number, (place, changes) in enumerate(
        [
            (Place(4, 1), {}),
            (Place(0, 1), {"count": 129}),
            (Place(0, 1), {"view": View.named("whole")}),
            (Place(0, 1), {"dtype": "float32"}),
        ]
    ):
        refusal = own.client.ask(own.request(number, place, **changes))
        assert isinstance(refusal, Failed)
        assert "does not fit part" in refusal.reason
    data = own.segment.array(own.segment.data_offset, (LAYOUT.slots, LAYOUT.slot_bytes), "u1")
    assert not data.any()
    assert own.client.ask(own.request(9, Place(3, own.segment.arm(3) or 0))) == Filled(9)
    images, labels, draws = (at - LAYOUT.slot_bytes for at in LAYOUT.offsets(3))
    assert not data[0].any()
    assert data[1, images : images + 128 * LAYOUT.image_bytes].any()
    for begin, size in ((images, 128 * LAYOUT.image_bytes), (labels, 128 * 8), (draws, 128 * 12)):
        data[1, begin : begin + size] = 0
    assert not data.any()


def _truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(PAGE_BYTES)


def _sparse(path: Path) -> None:
    os.truncate(path, 2**62)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [_truncated, _sparse, _fifo])
def test_no_file_that_a_client_attaches_ends_the_node(
    node_address: str, owner: Callable[[str], Owner], spoil: Callable[[Path], None]
) -> None:
    """A truncated segment, one of 2^62 bytes and a FIFO are refused, and the node serves its other clients."""
    own = owner(node_address)
    spoil(DIRECTORY / own.segment.name)
    assert own.client.ask(own.attach) == Attached(own.segment.name, accepted=False, reason=CANNOT_ATTACH)
    with Loader(node_address, transport="shm", timeout_s=20) as loader:
        assert sum(len(batch.labels) for batch in loader) == 300


def test_an_empty_file_of_another_user_keeps_no_node_from_starting(
    run_with_own_shm: Callable[..., str], dataset_dir: Path
) -> None:
    """It lies under a segment's name when a node starts and when it sweeps; the node runs on, and the file stays."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    assert "done" in run_with_own_shm(KILLED, str(dataset_dir), TRAINER, "12345")


@pytest.mark.parametrize("kernel", ["", "numpy"])
def test_a_segment_that_shrinks_under_a_worker_costs_its_client_only(
    start_node: StartNode,
    owner: Callable[[str], Owner],
    locked_parts: Callable[[Path], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernel: str,
) -> None:
    """The worker is replaced; the client is told the segment, and barred; no record is blamed; others lose nothing."""
    if kernel:
        monkeypatch.setenv("LOADER_SERVICE_KERNEL", kernel)
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    (worker,) = node.workers()
    with Loader(node.address, batch_size=16, epochs=3, timeout_s=20) as loader:
        got = [next(loader.all_epochs()).ids.tolist()]
        answer, attempts = None, 0
        while not isinstance(answer, Failed):  # else the worker wrote the slice before it could be stopped
            attempts += 1
            assert attempts < 50
            shrunk = owner(node.address)
            answer = _shrink_while_written(shrunk, worker, locked_parts)
        assert answer.record == -1
        assert f"shared memory {shrunk.segment.name} has been truncated" in answer.reason
        refused = shrunk.client.ask(shrunk.request(2, Place(1, 1)))
        assert (refused.record, refused.reason) == (-1, answer.reason)
        assert shrunk.client.ask(shrunk.attach) == Attached(shrunk.segment.name, accepted=False, reason=CANNOT_ATTACH)
        got += [batch.ids.tolist() for batch in loader.all_epochs()]
        assert [(a.delivered, a.expected) for a in loader.ledger] == [(300, 300)] * 3
    now = status(node.address)
    assert (now.restarts, now.bad_samples) == (1, 0)
    with Loader(node.address, batch_size=16, epochs=3, timeout_s=20) as loader:
        assert got == [batch.ids.tolist() for batch in loader.all_epochs()]
    _, said = node.stop()
    assert "ended by signal SIGBUS" in said
    assert f"shared memory {shrunk.segment.name} has been truncated or has lost pages; this node writes no more" in said


def _shrink_while_written(own: Owner, worker: psutil.Process, locked_parts: Callable[[Path], list[int]]) -> object:
    """Request a slice, and truncate the segment while the stopped worker is writing it; return the answer."""
    path = DIRECTORY / own.segment.name
    assert own.client.ask(own.attach).accepted
    own.client.send(own.request(1, Place(0, own.segment.arm(0) or 0)))
    while not locked_parts(path) and not own.client.answered:
        pass
    worker.suspend()
    while worker.status() != psutil.STATUS_STOPPED:
        os.sched_yield()
    if locked_parts(path):
        os.truncate(path, PAGE_BYTES)
    worker.resume()
    return own.client.receive()


def test_a_stopped_worker_that_cannot_let_go_is_replaced(
    start_node: StartNode, owner: Callable[[str], Owner], eventually: Eventually, tmp_path: Path
) -> None:
    """A worker without a lease that is stopped while hundreds of clients come and go is killed, and the node serves on."""
    node = start_node(workers=1, bind=f"ipc://{tmp_path}/node")
    own = owner(node.address)
    (worker,) = node.workers()
    worker.suspend()
    for _ in range(600):  # its socket holds about 280 orders
        assert own.client.ask(own.attach).accepted
        own.client.ask(Hello(PROTOCOL, "by hand"))  # a repeated Hello releases the segment
    eventually(lambda: status(node.address).restarts == 1, "the worker is replaced")
    assert own.client.ask(own.attach).accepted
    assert own.client.ask(own.request(1, Place(0, own.segment.arm(0) or 0))) == Filled(1)
    assert "does not read its orders: killed" in node.stop()[1]
