"""Tests of loops: one ``for`` is one epoch, whatever ends it, and a loader is used by one loop at a time."""

from __future__ import annotations

from typing import Any

import pytest

from loader_service import EpochAccount, Loader, errors
from loader_service.torch import TensorLoader

RECORDS, BATCH = 300, 64
STARTS = [0, 64, 128, 192, 256]
KINDS = ["Loader", "TensorLoader"]


class Loops:
    """A Loader with crops of 8 pixels, or a TensorLoader over it, to loop over."""

    def __init__(self, kind: str, address: str, **options: Any) -> None:
        self.loader = Loader(address, **{"batch_size": BATCH, "crop": 8, "timeout_s": 20} | options)
        self.loops: Any = self.loader if kind == "Loader" else TensorLoader(self.loader)

    def __enter__(self) -> Any:
        return self.loops

    def __exit__(self, *raised: object) -> None:
        self.loops.close()
        self.loader.close()


@pytest.fixture(params=KINDS)
def open_loops(request: pytest.FixtureRequest, node_address: str) -> Any:
    """``open_loops(**options)`` opens a Loader or a TensorLoader."""
    return lambda **options: Loops(request.param, node_address, **options)


def places(batches: Any) -> list[tuple[int, int]]:
    """Return the epoch and start of each batch."""
    return [(batch.epoch, batch.start) for batch in batches]


def accounts(loops: Any) -> list[tuple[int, int, int]]:
    """Return what each epoch expected, delivered and left out."""
    return [(account.expected, account.delivered, account.left_out) for account in loops.ledger]


def test_one_for_is_one_epoch(open_loops: Any) -> None:
    """Each loop has the next epoch, without an end by default, and len() is one epoch's batches."""
    with open_loops() as loops:
        for epoch in range(4):
            assert loops.epoch == epoch
            assert places(loops) == [(epoch, start) for start in STARTS]
        assert len(loops) == len(STARTS)
        assert accounts(loops) == [(RECORDS, RECORDS, 0)] * 4


def test_a_loop_beyond_the_last_epoch_is_an_error(open_loops: Any) -> None:
    """With epochs=2 the third loop raises an error that says so; the stream is only empty, and an earlier epoch may run again."""
    with open_loops(epochs=2) as loops:
        assert [len(places(loops)) for _ in range(2)] == [5, 5]
        with pytest.raises(errors.NoEpochLeft, match=r"epochs=2, and all of them have begun.*Raise epochs"):
            iter(loops)
        assert places(loops.all_epochs()) == []
        loops.set_epoch(1)
        assert places(loops) == [(1, start) for start in STARTS]


@pytest.mark.parametrize("taken", [1, 3, 4, 5])
def test_a_loop_after_a_break_is_the_next_epoch(open_loops: Any, taken: int) -> None:
    """The ledger counts the positions that a break left out, and each epoch adds up."""
    with open_loops() as loops:
        for number, batch in enumerate(loops, 1):
            assert loops.epoch == batch.epoch == 0
            if number == taken:
                break
        assert places(loops) == [(1, start) for start in STARTS]
        delivered = min(RECORDS, taken * BATCH)
        assert accounts(loops) == [(RECORDS, delivered, RECORDS - delivered), (RECORDS, RECORDS, 0)]


def test_an_iterator_that_returned_nothing_costs_no_epoch(open_loops: Any) -> None:
    """iter() alone begins nothing, as when a framework looks at an iterator and makes another."""
    with open_loops() as loops:
        iter(loops)
        assert places(loops) == [(0, start) for start in STARTS]


def test_an_iterator_continues_its_own_epoch(open_loops: Any) -> None:
    """A second loop over the same iterator has the rest of the epoch, and then it stays at its end."""
    with open_loops() as loops:
        iterator = iter(loops)
        for batch in iterator:
            if batch.start == 64:
                break
        assert places(iterator) == [(0, 128), (0, 192), (0, 256)]
        assert places(iterator) == []
        assert accounts(loops) == [(RECORDS, RECORDS, 0)]


def test_the_stream_continues_with_the_first_batch_not_returned(open_loops: Any) -> None:
    """all_epochs() goes on where any loop stopped, across epochs; a loop after it is the next epoch."""
    with open_loops() as loops:
        for batch in loops:
            if batch.start == 192:
                break
        stream = loops.all_epochs()
        assert places(next(stream) for _ in range(3)) == [(0, 256), (1, 0), (1, 64)]
        assert loops.epoch == 1
        assert places(next(loops.all_epochs()) for _ in range(2)) == [(1, 128), (1, 192)]
        assert places(loops) == [(2, start) for start in STARTS]
        assert accounts(loops)[:2] == [(RECORDS, RECORDS, 0), (RECORDS, 256, 44)]


def test_a_resumed_loop_is_the_rest_of_its_epoch(open_loops: Any) -> None:
    """After load_state_dict the first loop is the rest, the second one the next epoch, and len() stays a whole epoch's."""
    with open_loops() as loops:
        for batch in loops:
            if batch.start == 128:
                state = loops.state_dict()
                break
    with open_loops() as loops:
        loops.load_state_dict(state)
        assert (loops.epoch, len(loops)) == (0, 5)
        loops.set_epoch(0)  # the epoch that is next anyway
        assert places(loops) == [(0, 192), (0, 256)]
        assert places(loops) == [(1, start) for start in STARTS]
        assert accounts(loops) == [(108, 108, 0), (RECORDS, RECORDS, 0)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_state_at_an_epochs_end_gives_no_empty_loop(open_loops: Any, drop_last: bool) -> None:
    """Saved after the last batch, the state's first loop is the whole next epoch."""
    with open_loops(drop_last=drop_last) as loops:
        whole = places(loops)
        state = loops.state_dict()
    assert state["position"] == (256 if drop_last else 0)
    with open_loops(drop_last=drop_last) as loops:
        loops.load_state_dict(state)
        assert places(loops) == [(1, start) for _, start in whole]
        assert places(loops) == [(2, start) for _, start in whole]


def test_an_epoch_without_a_batch_is_refused(node_address: str) -> None:
    """With drop_last and too few records every loop would be empty, so the loader is refused."""
    with pytest.raises(errors.OptionError, match=r"drop_last=True cannot work.*300 records"):
        Loader(node_address, batch_size=301, drop_last=True, timeout_s=20)


def test_an_interrupted_loop_that_is_run_again_is_the_next_epoch(open_loops: Any) -> None:
    """A KeyboardInterrupt in the loop's body is like a break: a notebook's cell that is run again has a fresh epoch."""

    def cell(loops: Any, stop: int) -> list[tuple[int, int]]:
        seen = []
        for batch in loops:
            seen.append((batch.epoch, batch.start))
            if len(seen) == stop:
                raise KeyboardInterrupt
        return seen

    with open_loops() as loops:
        with pytest.raises(KeyboardInterrupt):
            cell(loops, 2)
        assert cell(loops, 0) == [(1, start) for start in STARTS]
        assert accounts(loops) == [(RECORDS, 128, 172), (RECORDS, RECORDS, 0)]


def test_set_epoch(open_loops: Any) -> None:
    """The expected epoch changes nothing; another one is begun from its start, forwards or backwards."""
    with open_loops() as loops:
        for epoch in (0, 1, 5, 2):
            loops.set_epoch(epoch)
            assert loops.epoch == epoch
            assert places(loops) == [(epoch, start) for start in STARTS]
        next(iter(loops))
        loops.set_epoch(3)  # in the middle of it: again from its start
        assert places(loops) == [(3, start) for start in STARTS]
        with pytest.raises(errors.OptionError, match="epoch=-1"):
            loops.set_epoch(-1)


def test_the_expected_epoch_keeps_the_prefetch(node_address: str, eventually: Any) -> None:
    """set_epoch() of the next epoch leaves the batches that are ready; that of another one drops them."""
    with Loader(node_address, batch_size=BATCH, crop=8, timeout_s=20) as loader:
        for _ in loader:
            loader.set_epoch(loader.epoch + 1)
        eventually(lambda: loader.ready > 0, "the next epoch is prefetched")
        ready = loader.ready
        loader.set_epoch(1)
        assert loader.ready >= ready
        loader.set_epoch(7)
        assert loader.ready == 0


def test_an_older_iterator_steals_nothing(open_loops: Any) -> None:
    """A newer iterator, set_epoch or load_state_dict ends the older one with an error that names what to use."""
    with open_loops() as loops:
        state = loops.state_dict()
        older = iter(loops)
        next(older)
        newer = iter(loops)
        for replace in (lambda: None, lambda: loops.set_epoch(4), lambda: loops.load_state_dict(state)):
            with pytest.raises(errors.IteratorReplaced, match="Open a second Loader for a second loop"):
                next(older)
            next(newer)
            replace()
            older, newer = newer, iter(loops)
        assert places(newer) == [(0, start) for start in STARTS]


def test_a_loader_is_no_iterator(open_loops: Any) -> None:
    """next(loader) is Python's error, as with a DataLoader: it would hide where an epoch ends."""
    with open_loops() as loops, pytest.raises(TypeError, match="not an iterator"):
        next(loops)


def test_ranks_leave_out_their_own_part(node_address: str) -> None:
    """After a break, each rank's account adds up to its own positions."""
    for rank in range(3):
        with Loader(node_address, batch_size=17, crop=8, rank=rank, world_size=3, timeout_s=20) as loader:
            for batch in loader:
                if batch.start >= 51:
                    break
            next(iter(loader))
            (first, _) = loader.ledger
            assert first.delivered + first.left_out == first.expected == 100
            assert first.delivered == 34


def test_accounts_add_up_over_resumes() -> None:
    """``continued`` adds the positions left out."""
    first, rest = EpochAccount(2, 300, 100), EpochAccount(2, 200, 150, left_out=50)
    account = first.continued(rest)
    assert (account.expected, account.delivered, account.left_out) == (300, 250, 50)


def test_a_batch_shows_shapes_and_no_pixels(node_address: str) -> None:
    """repr() is one short line."""
    with Loader(node_address, batch_size=4, timeout_s=20) as loader:
        text = repr(next(iter(loader)))
        assert text.startswith(
            "Batch(images=uint8 (4, 224, 224, 3), labels=int64 (4,), ids=int64 (4,), sources=int64 (4,)"
        )
        assert text.endswith("epoch=0, start=0)")
        with TensorLoader(loader, ("cpu", "cpu"), extra=lambda batch: {"e": batch.ids}) as batches:
            text = repr(next(iter(batches)))
        assert text.startswith("TensorBatch(images=uint8 (4, 224, 224, 3), labels=int64 (4,)")
        assert text.endswith("epoch=1, start=0, extra['e']=int64 (4,), on cpu, copy on cpu)")


def test_a_loop_over_the_loader_replaces_its_tensor_loaders(node_address: str) -> None:
    """A TensorLoader whose Loader is looped over says so, instead of missing batches."""
    with Loader(node_address, batch_size=BATCH, crop=8, timeout_s=20) as loader, TensorLoader(loader) as batches:
        stream = batches.all_epochs()
        assert next(stream).start == 0
        next(iter(loader))
        with pytest.raises(errors.IteratorReplaced):
            next(stream)
