"""Late writers and late requests: their bytes must not reach any batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loader_service import Batch, Loader, View, defaults, status
from loader_service.types import SliceId
from loader_service.wire import messages
from loader_service.wire.messages import Filled, Place, Request, UnknownClient, Welcome
from loader_service.wire.shm import Segment

StartNode = Callable[..., Any]
Eventually = Callable[[Callable[[], bool], str], None]
LockedParts = Callable[[Path], list[int]]

OPTIONS: dict[str, Any] = {"batch_size": 16, "dtype": "float32", "prefetch": 6, "epochs": 4, "timeout_s": 20}
SLOTS = 8  # prefetch and SPARE_SLOTS
ONE_SAMPLE = messages.SlotLayout(slots=1, batch_size=1, slice_samples=1, image_bytes=224 * 224 * 3, draws_bytes=12)
LOOKS = 50  # attempts after each batch to find the worker while it writes


def _digest(batch: Batch) -> bytes:
    hashed = hashlib.blake2b()
    for array in (batch.images, batch.labels, batch.draws):
        hashed.update(array.tobytes())
    return hashed.digest()


def _digests(address: str) -> list[bytes]:
    with Loader(address, **OPTIONS) as loader:
        return [_digest(batch) for batch in loader.all_epochs()]


def _stopped_while_writing(worker: psutil.Process, segment: Path, locked_parts: LockedParts) -> bool:
    """Look for the worker in a part, and stop it there; return whether it was found."""
    for _ in range(LOOKS):
        if not locked_parts(segment):
            continue
        worker.suspend()
        while worker.status() != psutil.STATUS_STOPPED:
            os.sched_yield()
        if locked_parts(segment):
            return True
        worker.resume()
    return False


def _stop_while_writing(
    worker: psutil.Process, segment: Path, locked_parts: LockedParts, loader: Loader
) -> list[bytes]:
    """Stop the only worker while it holds a part; return the digests of the batches taken until then."""
    taken = []
    for batch in loader.all_epochs():  # next() has returned a slot, and the loader requests its slices again
        found = _stopped_while_writing(worker, segment, locked_parts)
        taken.append(_digest(batch))  # after the search: a digest takes longer than a slice
        if found:
            return taken
        del batch
    pytest.fail("the worker was never found while it wrote a slice")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make clients declare a silent node lost after a second."""
    monkeypatch.setattr(defaults, "NODE_SILENT_S", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_wakes_while_writing_a_slice_changes_no_batch(
    start_node: StartNode,
    eventually: Eventually,
    my_segments: Callable[[], set[Path]],
    locked_parts: LockedParts,
    tmp_path: Path,
) -> None:
    """A node that is stopped while it writes a slice, and resumes after all slots were reused, changes no batch.

    The lock protects the part that the worker was writing; the generations protect the parts of its other leases.
    """
    sleeper, elsewhere = start_node(workers=1), f"ipc://{tmp_path}/awake"
    undisturbed = _digests(sleeper.address)
    with Loader(f"{sleeper.address},{elsewhere}", transport="shm", **OPTIONS) as loader:
        (segment,) = my_segments()
        got = _stop_while_writing(sleeper.workers()[0], segment, locked_parts, loader)
        eventually(lambda: status(sleeper.address).leases >= 2, "the stopped worker has a second lease")
        psutil.Process(sleeper.process.pid).suspend()
        start_node(workers=1, bind=elsewhere)
        got += [
            _digest(next(loader.all_epochs())) for _ in range(2 * SLOTS)
        ]  # the sleeper is lost by then, and every slot reused
        held = [next(loader.all_epochs()) for _ in range(SLOTS - 2)]
        before = [_digest(batch) for batch in held]
        assert locked_parts(segment)  # the stopped worker still holds its part
        sleeper.workers()[0].resume()
        psutil.Process(sleeper.process.pid).resume()
        eventually(lambda: status(sleeper.address).leases == 0, "the sleeper has finished its leases")
        assert [_digest(batch) for batch in held] == before
        del held
        got += before + [_digest(batch) for batch in loader.all_epochs()]
        reassigned = sum(account.reassigned for account in loader.ledger)
    assert got == undisturbed
    assert reassigned >= 2


def test_a_killed_nodes_stopped_worker_never_wakes(
    start_node: StartNode,
    eventually: Eventually,
    my_segments: Callable[[], set[Path]],
    locked_parts: LockedParts,
    tmp_path: Path,
) -> None:
    """A worker that is stopped while it writes dies with its killed dispatcher, and its part is free again."""
    dying, elsewhere = start_node(workers=1), f"ipc://{tmp_path}/survivor"
    undisturbed = _digests(dying.address)
    with Loader(f"{dying.address},{elsewhere}", transport="shm", **OPTIONS) as loader:
        (segment,) = my_segments()
        orphan = dying.workers()[0]
        got = _stop_while_writing(orphan, segment, locked_parts, loader)
        dying.process.kill()
        eventually(lambda: not orphan.is_running() and not locked_parts(segment), "the orphan and its lock are gone")
        start_node(workers=1, bind=elsewhere)
        got += [_digest(batch) for batch in loader.all_epochs()]
    assert got == undisturbed


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(ONE_SAMPLE.slots * ONE_SAMPLE.slot_bytes, ONE_SAMPLE.parts)
    yield made
    made.unlink()
    made.close()


def test_a_request_that_waited_for_a_node_which_is_gone_is_dropped_by_the_next(
    start_node: StartNode, connect: Callable[[str], Any], segment: Segment
) -> None:
    """A request names an instance; another instance at the same address answers UnknownClient and writes nothing."""
    old = start_node(workers=1)
    by_hand = connect(old.address)
    welcome = by_hand.ask(messages.Hello(messages.PROTOCOL, "by hand"))
    by_hand.close()
    assert isinstance(welcome, Welcome)
    address = old.address
    old.process.kill()
    old.process.communicate()
    start_node(workers=1, bind=address)
    view = View.named("center")
    place = Place(0, segment.arm(0) or 0)
    late = Request(welcome.instance, 1, "train", SliceId(view, 0, 0, 5, 1), "uint8", place)
    by_hand = connect(address)
    renewed = by_hand.ask(messages.Hello(messages.PROTOCOL, "by hand"))
    attach = messages.Attach(segment.name, segment.nonce, ONE_SAMPLE)
    assert by_hand.ask(attach) == messages.Attached(segment.name, accepted=True)
    pixels = segment.array(segment.data_offset, (ONE_SAMPLE.image_bytes,), np.uint8)
    assert isinstance(by_hand.ask(late), UnknownClient)
    assert not pixels.any()
    assert isinstance(renewed, Welcome)
    current = Request(renewed.instance, 2, "train", SliceId(view, 0, 0, 5, 1), "uint8", place)
    assert by_hand.ask(current) == Filled(2)
    assert pixels.any()
