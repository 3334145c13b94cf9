"""Tests of loaders in threads, forks and DataLoader workers, after close(), and of ranks that are found."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from loader_service import Loader, errors
from loader_service.client.session import log
from loader_service.torch import TensorLoader

RECORDS = 300
Eventually = Callable[[Callable[[], bool], str], None]


def opened(address: str, **options: Any) -> Loader:
    return Loader(address, **{"batch_size": 50, "crop": 8, "timeout_s": 20} | options)


def ids(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch.ids.tolist()]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-service")]


@pytest.fixture
def stopped(start_node: Callable[..., Any]) -> Iterator[SimpleNamespace]:
    """A loader whose node is stopped, after all of its batches were taken, so that the next call waits."""
    node = start_node(workers=1)
    family = node.family
    loader = opened(node.address, batch_size=300, prefetch=1)
    stream = loader.all_epochs()
    next(stream)
    for process in family:
        process.suspend()
    yield SimpleNamespace(loader=loader, stream=stream, node=node)
    for process in family:
        if process.is_running():
            process.resume()
    loader.close()


def drain(stream: Any) -> None:
    """Take batches until the call waits, and longer."""
    for _ in stream:
        pass


# After close()


@pytest.mark.parametrize("kind", ["Loader", "TensorLoader"])
def test_a_closed_loader_says_so(node_address: str, kind: str) -> None:
    """next(), iter(), all_epochs() and set_epoch() raise one named error; what was counted can still be read."""
    loader = opened(node_address)
    loops: Any = loader if kind == "Loader" else TensorLoader(loader)
    stream, state = loops.all_epochs(), loops.state_dict()
    next(stream)
    loops.close()
    for use in (lambda: next(stream), lambda: iter(loops), loops.all_epochs, lambda: loops.set_epoch(1)):
        with pytest.raises(errors.LoaderClosed, match=f"this {kind} is closed: open another one"):
            use()
    assert [account.delivered for account in loops.ledger] == [50]
    assert loops.state_dict() == state | {"position": 50}
    loops.close()
    loader.close()


def test_closing_ends_a_wait_in_another_thread(stopped: SimpleNamespace, eventually: Eventually) -> None:
    """A thread that waits for a batch gets the same error."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(drain, stopped.stream)
        eventually(lambda: stopped.loader.ready == 0 and bool(stopped.loader._user), "the thread waits")
        stopped.loader.close()
        with pytest.raises(errors.LoaderClosed):
            waiting.result(20)


def test_a_loader_may_be_collected_in_its_own_thread(
    start_node: Callable[..., Any], my_segments: Callable[[], set[Path]], eventually: Eventually
) -> None:
    """The last reference goes in the session's thread, which closes the loader without waiting for itself."""
    node = start_node(workers=1)
    holder = [opened(node.address)]
    next(holder[0].all_epochs())
    dropped_by: list[str] = []

    class Drop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if holder:
                dropped_by.append(threading.current_thread().name)
                holder.clear()

    handler = Drop()
    log.addHandler(handler)
    try:
        node.process.kill()  # its loss is logged by the session's thread
        eventually(lambda: threads() == [], "the thread ends")
    finally:
        log.removeHandler(handler)
    assert dropped_by == ["loader-service"]
    assert my_segments() == set()


# Threads


def test_loaders_in_threads(node_address: str) -> None:
    """Each thread has a loader of its own; all get the same epoch."""

    def epoch(_: int) -> list[int]:
        with opened(node_address) as loader:
            return ids(loader)

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(epoch, range(4)))
    assert sorted(runs[0]) == list(range(RECORDS))
    assert runs == [runs[0]] * 4


def test_a_loader_moves_to_another_thread(node_address: str) -> None:
    """Two threads may use one loader, one after the other."""
    with opened(node_address) as loader, ThreadPoolExecutor(1) as pool:
        stream = loader.all_epochs()
        starts = [pool.submit(lambda: next(stream).start).result() if n % 2 else next(stream).start for n in range(6)]
    assert starts == [0, 50, 100, 150, 200, 250]


def test_a_second_thread_is_refused(stopped: SimpleNamespace, eventually: Eventually) -> None:
    """While one thread waits for a batch, another one is told to open its own loader."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(drain, stopped.stream)
        eventually(lambda: stopped.loader.ready == 0 and bool(stopped.loader._user), "the thread waits")
        with pytest.raises(errors.LoaderBusy, match="open a Loader for each thread"):
            next(stopped.stream)
        stopped.loader.close()
        assert isinstance(waiting.exception(20), errors.LoaderClosed)


# Processes


def in_child(action: Callable[[], str]) -> str:
    """Return what an action returns in a forked child, which ends as Python programs do."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, action().encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except errors.LoaderForked as error:
        return str(error)
    return "not refused"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["Loader", "TensorLoader"])
def test_a_forked_copy_is_refused(node_address: str, kind: str, my_segments: Callable[[], set[Path]]) -> None:
    """Every use in the child names what to do instead; the child may close its copy, and the parent's goes on."""
    with opened(node_address) as loader:
        loops: Any = loader if kind == "Loader" else TensorLoader(loader)
        stream = loops.all_epochs()
        first = next(stream).start
        for use in (lambda: next(stream), lambda: iter(loops), loops.all_epochs, lambda: loops.set_epoch(3)):
            said = in_child(lambda use=use: refusal(use))  # type: ignore[misc]
            assert f"opened by process {os.getpid()} and does not work in process" in said
            assert "open a Loader in each process that reads batches" in said
        assert in_child(lambda: str(loader.close())) == "None"
        assert len(my_segments()) == 1
        assert [first, *(next(stream).start for _ in range(5))] == [0, 50, 100, 150, 200, 250]
        loops.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own(node_address: str) -> None:
    """A loader that is opened after the fork works, beside the parent's."""

    def child() -> str:
        with opened(node_address) as own:
            return ",".join(map(str, ids(own)))

    with opened(node_address) as loader:
        stream = loader.all_epochs()
        head = next(stream).ids.tolist()
        theirs = [int(number) for number in in_child(child).split(",")]
        ours = head + [number for _ in range(5) for number in next(stream).ids.tolist()]
    assert theirs == ours
    assert sorted(ours) == list(range(RECORDS))


class Wrapped(IterableDataset[Any]):
    """Batches for a DataLoader, from a loader that is given or one that each worker opens."""

    def __init__(self, loader: Loader | None, address: str, *, split_by_worker: bool = False) -> None:
        self._loader, self._address, self._split = loader, address, split_by_worker

    def __iter__(self) -> Iterator[list[int]]:
        if self._loader is not None:
            yield from (batch.ids.tolist() for batch in self._loader)
            return
        worker = get_worker_info()
        ranks = {"rank": worker.id, "world_size": worker.num_workers} if self._split else {}
        with opened(self._address, **ranks) as loader:
            yield from (batch.ids.tolist() for batch in loader)


def loaded(dataset: Wrapped, workers: int) -> list[int]:
    """Return what a DataLoader of so many workers gives, sorted."""
    return sorted(number for batch in DataLoader(dataset, batch_size=None, num_workers=workers) for number in batch)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_inside_of_a_data_loaders_worker(node_address: str) -> None:
    """One worker, and ranks by worker, give each sample once; a copied loader and repeated data are refused."""
    everything = list(range(RECORDS))
    with opened(node_address) as loader:
        assert loaded(Wrapped(loader, ""), 0) == everything
        with pytest.raises(RuntimeError, match=r"open a Loader in each process.*num_workers=0"):
            loaded(Wrapped(loader, ""), 1)
    assert loaded(Wrapped(None, node_address), 1) == everything
    assert loaded(Wrapped(None, node_address, split_by_worker=True), 2) == everything
    with pytest.raises(RuntimeError, match=r"a multiple of the DataLoader's 2 workers.*without a DataLoader"):
        loaded(Wrapped(None, node_address), 2)


def test_a_loader_is_not_sent_to_another_process(node_address: str) -> None:
    """A DataLoader that starts its workers by spawn gets the same sentence."""
    with opened(node_address) as loader, pytest.raises(errors.LoaderForked, match="open a Loader in each process"):
        list(DataLoader(Wrapped(loader, ""), batch_size=None, num_workers=1, multiprocessing_context="spawn"))


# Ranks


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_ranks_are_found_in_the_environment(node_address: str, no_ranks: pytest.MonkeyPatch) -> None:
    """rank="auto" takes RANK and WORLD_SIZE, as torchrun sets them, and is 0 of 1 without; together the ranks have all."""
    with opened(node_address, rank="auto") as loader:
        assert (loader.rank, loader.world_size) == (0, 1)
    got = []
    for rank in range(3):
        no_ranks.setenv("RANK", str(rank))
        no_ranks.setenv("WORLD_SIZE", "3")
        with opened(node_address, rank="auto") as loader:
            assert (loader.rank, loader.world_size) == (rank, 3)
            got += ids(loader)
    assert sorted(got) == list(range(RECORDS))


def test_torch_distributed_comes_first(node_address: str, no_ranks: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If it is initialised, its ranks count, whatever the environment says."""
    no_ranks.setenv("RANK", "1")
    no_ranks.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with opened(node_address, rank="auto") as loader:
            assert (loader.rank, loader.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "2")])
def test_ranks_that_cannot_be_are_named(
    node_address: str, no_ranks: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: str, size: str
) -> None:
    """With rank="auto" the error names the variables; without, they are another program's business."""
    no_ranks.setenv("RANK", rank)
    no_ranks.setenv("WORLD_SIZE", size)
    with pytest.raises(errors.OptionError, match="RANK, WORLD_SIZE"):
        opened(node_address, rank="auto")
    opened(node_address).close()
    assert caplog.text == ""


def test_a_world_size_that_contradicts_is_refused(node_address: str, no_ranks: pytest.MonkeyPatch) -> None:
    """rank="auto" finds the world size, too."""
    no_ranks.setenv("RANK", "0")
    no_ranks.setenv("WORLD_SIZE", "2")
    opened(node_address, rank="auto", world_size=2).close()
    with pytest.raises(errors.OptionError, match="world_size=3"):
        opened(node_address, rank="auto", world_size=3)


def test_ranks_with_the_same_data_are_told(
    node_address: str, no_ranks: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A loader without ranks in a process of several warns; one whose ranks are given does not."""
    no_ranks.setenv("RANK", "1")
    no_ranks.setenv("WORLD_SIZE", "2")
    opened(node_address, rank=0, world_size=1).close()
    opened(node_address, rank="auto").close()
    assert caplog.text == ""
    opened(node_address).close()
    assert "rank 1 of 2, but its Loader is rank 0 of 1, so that all ranks get the same data" in caplog.text
    assert "rank='auto'" in caplog.text
