"""Tests of exceptions that are raised inside of a loader, as Ctrl-C raises them: no batch, slot, thread or segment is lost."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import loader_service
from loader_service import Batch, Loader, View
from loader_service.data.augment import complete_view
from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import Records
from loader_service.torch import TensorLoader
from loader_service.types import SampleLayout, SliceId

RECORDS, BATCH, SEED = 300, 48, 3
VIEW = View(crop=8)
STARTS = list(range(0, RECORDS, BATCH))
SLOTS = 6
INTERRUPTS = 2000
PACKAGE = str(Path(loader_service.__file__).parent)

Key = tuple[int, int, bytes]
Eventually = Callable[[Callable[[], bool], str], None]


def key_of(batch: Any) -> Key:
    """Return a batch's place and a digest of its pixels and labels."""
    images, labels = (a if isinstance(batch, Batch) else a.numpy() for a in (batch.images, batch.labels))
    return batch.epoch, batch.start, hashlib.sha256(images.tobytes() + labels.tobytes()).digest()


@pytest.fixture
def pure(dataset_dir: Path) -> Iterator[Callable[[int], Key]]:
    """``pure(n)`` is the key of the n-th batch of a run, made by the pure function in this process."""
    with Records(dataset_dir / "train.lmdb") as records:
        view = complete_view(VIEW, records.statistics)

        def key(number: int) -> Key:
            epoch, start = number // len(STARTS), STARTS[number % len(STARTS)]
            count = min(BATCH, RECORDS - start)
            made = empty_slice(SampleLayout(view, "uint8"), count)
            fill(made, records, SliceId(view, SEED, epoch, start, count))
            return epoch, start, hashlib.sha256(made.images.tobytes() + made.labels.tobytes()).digest()

        yield key


@contextmanager
def opened(kind: str, address: str) -> Iterator[tuple[Loader, Any]]:
    """Open a Loader, and the Loader or TensorLoader to loop over."""
    with Loader(address, view=VIEW, batch_size=BATCH, seed=SEED, timeout_s=20) as loader:
        if kind == "Loader":
            yield loader, loader
        else:
            with TensorLoader(loader) as batches:
                yield loader, batches


class Bomb:
    """A trace function that raises KeyboardInterrupt at the event with a given number, counted from 0.

    Args:
        number: of the event.
        opcodes: count opcodes, too, and not only lines, calls and returns.
        within: count the events in files whose path begins so.
    """

    def __init__(self, number: int, opcodes: bool = True, within: str = "") -> None:
        self._left, self._opcodes, self._within = number, opcodes, within
        self.exploded = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = self._opcodes
        if frame.f_code.co_filename.startswith(self._within):
            self._left -= 1
            if self._left < 0 and not self.exploded:
                self.exploded = True
                raise KeyboardInterrupt
        return None if self.exploded else self

    def run(self, action: Callable[[], Any]) -> Any:
        """Run an action with the bomb; return its result, or None if the bomb exploded."""
        before = sys.gettrace()
        gc.disable()  # what other tests left to collect is no part of the action
        sys.settrace(self)
        try:
            return action()
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(before)
            gc.enable()


def all_slots_are_back(loader: Loader, eventually: Eventually) -> None:
    """Check that no slot is lost: a caller can hold all of them at once, and when it lets go of them none is held."""
    stream = loader.all_epochs()
    held = [next(stream) for _ in range(SLOTS)]
    assert len(held) == SLOTS
    del held, stream
    eventually(lambda: loader.metrics.slots["held"] == 0, "no slot is held")
    loader.set_epoch(10**6)
    next(iter(loader))


@pytest.mark.parametrize("kind", ["Loader", "TensorLoader"])
def test_an_exception_at_any_opcode_of_next_costs_nothing(
    node_address: str, kind: str, pure: Callable[[int], Key], eventually: Eventually
) -> None:
    """Raised once at each event of next() and all that it calls; the call after it returns the batch that was not returned."""
    with opened(kind, node_address) as (loader, loops):
        stream = loops.all_epochs()
        seen, number, calm = [], 0, 0
        while calm < 5:  # the paths of next() differ in length: end after a few of the longest
            bomb = Bomb(number)
            batch = bomb.run(stream.__next__)  # no frame of this test is traced
            calm = 0 if bomb.exploded else calm + 1
            seen.append(key_of(next(stream) if batch is None else batch))
            del batch
            number += 1
        assert number > 300
        assert seen == [pure(n) for n in range(len(seen))]
        assert sum(account.delivered for account in loops.ledger) == sum(
            min(BATCH, RECORDS - start) for _, start, _ in seen
        )
        loops.set_epoch(loops.epoch + 9)
        del stream
        all_slots_are_back(loader, eventually)


@pytest.mark.parametrize("kind", ["Loader", "TensorLoader"])
def test_thousands_of_signals_cost_nothing(
    node_address: str,
    kind: str,
    pure: Callable[[int], Key],
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A storm of signals whose handler raises inside of next(): every batch arrives once, in order, with its bytes."""
    inside = str(Path(PACKAGE) / "client" / "epochs.py")
    swallowed: list[Any] = []  # by a finaliser, for instance
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: swallowed.append(repr(unraisable)))

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "__next__" and frame.f_code.co_filename == inside:
                raise KeyboardInterrupt
            frame = frame.f_back

    with opened(kind, node_address) as (loader, loops):
        stream = loops.all_epochs()
        seen: list[Key] = []
        caught = 0
        gc.disable()  # else what other tests left may swallow one
        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.00013)
        try:
            while caught < INTERRUPTS:
                try:
                    for batch in stream:
                        seen.append(key_of(batch))
                        del batch
                        if caught >= INTERRUPTS:
                            break
                except KeyboardInterrupt:
                    caught += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            gc.enable()
        assert swallowed == []
        assert seen == [pure(n) for n in range(len(seen))]
        loops.set_epoch(loops.epoch + 9)
        del stream
        all_slots_are_back(loader, eventually)


def test_an_exception_at_any_line_of_iter_costs_nothing(node_address: str) -> None:
    """Raised once at each event of iter(), after a break; the loop after it is the next epoch, and the accounts add up."""
    with opened("Loader", node_address) as (loader, _):
        number, exploded = 0, True
        while exploded:
            bomb = Bomb(number, opcodes=False)
            next(iter(loader))
            epoch = loader.epoch
            bomb.run(lambda: iter(loader))
            exploded = bomb.exploded
            first = next(iter(loader))
            assert (first.epoch, first.start) == (epoch + 1, 0)
            del first
            number += 1
        assert number > 20
        *whole, _ = loader.ledger
        assert all(a.delivered + a.left_out == a.expected == RECORDS for a in whole)


def threads() -> list[str]:
    """Return the names of the loader's threads in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-service")]


def descriptors() -> int:
    """Return the number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("address_of", ["node", "name"])
def test_an_exception_at_any_line_of_the_constructor_leaves_nothing(
    node_address: str, my_segments: Callable[[], set[Path]], eventually: Eventually, address_of: str
) -> None:
    """Raised once at each line: no thread, segment or descriptor stays, whether a name is looked up or not."""
    address = node_address if address_of == "node" else f"{node_address},tcp://localhost:9"
    with Loader(address, view=VIEW, batch_size=BATCH, timeout_s=20) as loader:
        next(iter(loader))  # what a process opens once and keeps is open now
    eventually(lambda: threads() == [], "the threads end")
    before = descriptors()
    number, exploded = 0, True
    while exploded:
        bomb = Bomb(number, opcodes=False, within=PACKAGE)
        loader = bomb.run(lambda: Loader(address, view=VIEW, batch_size=BATCH, timeout_s=20))
        exploded = bomb.exploded
        if loader is not None:
            loader.close()
        del loader
        assert my_segments() == set()
        eventually(lambda: threads() == [], "the threads end")
        number += 3  # a third of the lines: the others are no calls more
    assert number > 100
    eventually(lambda: descriptors() <= before, "the descriptors are closed")


def test_an_interrupted_close_is_made_up_for(node_address: str, my_segments: Callable[[], set[Path]]) -> None:
    """Raised once at each line of close(): the next close() finishes the work."""
    number, exploded = 0, True
    while exploded:
        loader = Loader(node_address, view=VIEW, batch_size=BATCH, timeout_s=20)
        held = next(iter(loader))
        bomb = Bomb(number, opcodes=False, within=PACKAGE)
        bomb.run(loader.close)
        exploded = bomb.exploded
        loader.close()
        assert (threads(), my_segments()) == ([], set())
        assert held.images.any()
        number += 1
    assert number > 10
