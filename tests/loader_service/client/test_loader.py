"""Tests of the public Loader against real nodes: bytes, order, states, ranks and errors."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service import DRAWS, Batch, Loader, LocalNode, View, describe, errors
from loader_service.data.augment import complete_view
from loader_service.data.fill import empty_slice, fill
from loader_service.data.manifest import Statistics
from loader_service.data.records import Records
from loader_service.types import SampleLayout, SliceId

RECORDS = 300


def _load(address: str, **options: Any) -> Loader:
    return Loader(address, **{"timeout_s": 20, "batch_size": 64, "epochs": 1} | options)


def _content(batch: Batch) -> bytes:
    digest = hashlib.sha256()
    for array in (batch.images, batch.labels, batch.ids, batch.sources, batch.draws):
        digest.update(array.tobytes())
    return digest.digest()


def _run(address: str, **options: Any) -> list[bytes]:
    with _load(address, **options) as loader:
        return [_content(batch) for batch in loader.all_epochs()]


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("view", ["train", "center", "ten-crop", "whole"])
def test_shared_memory_and_frames_give_the_pure_functions_bytes(
    node_address: str, dataset_dir: Path, view: str, dtype: Any
) -> None:
    """Both transports deliver exactly the bytes that ``fill`` writes in this process, for every view and dtype."""
    with Records(dataset_dir / "val.lmdb") as records:
        complete = complete_view(View.named(view), records.statistics)
        direct = empty_slice(SampleLayout(complete, dtype), len(records))
        fill(direct, records, SliceId(complete, 5, 0, 0, len(records)))
    for transport in ("shm", "tcp"):
        with _load(
            node_address, split="val", view=view, dtype=dtype, seed=5, transport=transport, batch_size=25
        ) as loader:
            batches = [(b.images.copy(), b.labels.copy(), b.draws.copy()) for b in loader.all_epochs()]
        images, labels, draws = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        np.testing.assert_array_equal(images, direct.images)
        np.testing.assert_array_equal(labels, direct.labels)
        np.testing.assert_array_equal(draws, direct.draws)
        assert (images.dtype, draws.dtype) == (np.dtype(dtype), DRAWS)


def test_records_of_another_side(tmp_path: Path, make_dataset: Callable[..., Any], picture: Callable[..., Any]) -> None:
    """Both transports serve 64-pixel records: crops of 56 pixels by default, other crops, and none beyond 64."""
    make_dataset(tmp_path / "train.lmdb", 20, side=64)
    with LocalNode(tmp_path, 1) as node:
        for transport in ("shm", "tcp"):
            for options, side in (({}, 56), ({"crop": 40}, 40), ({"view": View(crop=33, flip=False)}, 33)):
                with _load(node.address, transport=transport, **options) as loader:
                    assert (loader.dataset.side, loader.dataset.mean.shape) == (64, (64, 64, 3))
                    assert next(loader.all_epochs()).images.shape == (20, side, side, 3)
            with _load(node.address, transport=transport, view="whole") as loader:
                batch = next(loader.all_epochs())
                assert np.array_equal(batch.images, [picture(number, 64) for number in batch.ids.tolist()])
            with _load(node.address, transport=transport, view="ten-crop", crop=64) as loader:
                assert next(loader.all_epochs()).images.shape == (20, 10, 64, 64, 3)
        for options, sentence in (
            ({"crop": 65}, "1 to 64 pixels, the side of this dataset's records"),
            ({"crop": 0}, "1 to 64 pixels"),
            ({"view": View()}, "1 to 64 pixels"),
            ({"view": "whole", "crop": 64}, "no crop with the view whole"),
        ):
            with pytest.raises(errors.OptionError, match=sentence):
                _load(node.address, **options)


def test_any_number_of_workers_gives_the_same_epoch(dataset_dir: Path) -> None:
    """1 and 3 workers, shared memory and TCP give equal batches, with every id exactly once per epoch."""
    runs = []
    for workers in (1, 3):
        with LocalNode(dataset_dir, workers) as node:
            for transport in ("shm", "tcp"):
                runs.append(_run(node.address, epochs=2, transport=transport))
                with _load(node.address, epochs=2, transport=transport) as loader:
                    ids = np.concatenate([batch.ids for batch in loader.all_epochs()]).reshape(2, RECORDS)
                assert [sorted(epoch.tolist()) for epoch in ids] == [list(range(RECORDS))] * 2
                assert ids[0].tolist() != ids[1].tolist()
    assert all(run == runs[0] for run in runs)
    assert len(runs[0]) == 10


def test_a_batch_has_the_documented_shapes(node_address: str) -> None:
    """Shapes, dtypes, epoch and start are as documented; the last batch is short."""
    with _load(node_address, batch_size=128) as loader:
        assert len(loader) == 3
        batches = [
            (b.images.shape, b.images.dtype, b.labels.dtype, b.ids.dtype, b.draws.shape, b.epoch, b.start)
            for b in loader.all_epochs()
        ]
    assert [shape for shape, *_ in batches] == [(128, 224, 224, 3), (128, 224, 224, 3), (44, 224, 224, 3)]
    assert all(rest[:3] == [np.uint8, np.int64, np.int64] for _, *rest in batches)
    assert [rest[3:] for _, *rest in batches] == [[(128,), 0, 0], [(128,), 0, 128], [(44,), 0, 256]]


def test_labels_belong_to_the_ids(node_address: str) -> None:
    """A sample's label is its record's, and its source is its id."""
    with _load(node_address) as loader:
        for batch in loader.all_epochs():
            assert batch.labels.tolist() == (batch.ids % 3).tolist()
            assert batch.sources.tolist() == batch.ids.tolist()


def test_the_dataset_is_described(node_address: str, statistics: Statistics) -> None:
    """``loader.dataset`` and ``describe`` return the manifest's facts."""
    with _load(node_address) as loader:
        for dataset in (loader.dataset, describe(node_address)):
            assert (dataset.count, dataset.class_names) == (RECORDS, ("ant", "bee", "cat"))
            np.testing.assert_array_equal(dataset.mean, statistics.mean_image)
            np.testing.assert_array_equal(dataset.eigenvalues, statistics.eigenvalues)
            np.testing.assert_array_equal(dataset.eigenvectors, statistics.eigenvectors)
    assert describe(node_address, "val").count == 60


def test_ranks_together_have_one_ranks_order(node_address: str) -> None:
    """The concatenated parts of three ranks are the batches of one rank with three times the size."""
    with _load(node_address, batch_size=96, epochs=2) as loader:
        whole = [(b.ids.copy(), _content(b)) for b in loader.all_epochs()]
    loaders = [_load(node_address, batch_size=32, epochs=2, rank=r, world_size=3) for r in range(3)]
    steps = [[(b.ids.copy(), b.images.copy()) for b in loader.all_epochs()] for loader in loaders]
    for loader in loaders:
        loader.close()
    assert [len(s) for s in steps] == [len(whole)] * 3
    for step, (ids, _) in enumerate(whole):
        assert np.concatenate([s[step][0] for s in steps]).tolist() == ids.tolist()


def test_more_ranks_than_samples_still_step_equally_often(node_address: str) -> None:
    """In an epoch's last batch some ranks may get an empty batch."""
    sizes = []
    for rank in range(4):
        with _load(node_address, split="val", view="center", batch_size=19, rank=rank, world_size=3 + 1) as loader:
            sizes.append([len(batch.labels) for batch in loader.all_epochs()])
    assert {len(s) for s in sizes} == {1}
    assert sum(sum(s) for s in sizes) == 60
    with _load(node_address, split="val", view="center", batch_size=59) as one:
        assert [len(b.labels) for b in one] == [59, 1]
    with _load(node_address, split="val", view="center", batch_size=59, rank=0, world_size=2) as first:
        assert [len(b.labels) for b in first] == [30]


def test_drop_last(node_address: str) -> None:
    """The remainder is left out, and the ledger does not expect it."""
    with _load(node_address, drop_last=True, epochs=2) as loader:
        assert [len(b.labels) for b in loader.all_epochs()] == [64] * 8
        assert len(loader) == 4
        assert [(a.expected, a.delivered) for a in loader.ledger] == [(256, 256)] * 2


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 10])
def test_a_state_resumes_at_the_next_batch(node_address: str, stop: int) -> None:
    """A new loader that loads a state, saved as JSON after any number of batches, delivers the rest of the run."""
    undisturbed = _run(node_address, epochs=2)
    with _load(node_address, epochs=2) as loader:
        head = [_content(next(loader.all_epochs())) for _ in range(stop)]
        state = json.loads(json.dumps(loader.state_dict()))
    with _load(node_address, epochs=2) as loader:
        loader.load_state_dict(state)
        tail = [_content(batch) for batch in loader.all_epochs()]
    assert head + tail == undisturbed


def test_a_state_resumes_with_another_world(node_address: str) -> None:
    """A run of one rank that is resumed with two ranks and another batch size loses and repeats no sample."""
    with _load(node_address) as loader:
        head = [next(loader.all_epochs()).ids.copy() for _ in range(2)]
        state = loader.state_dict()
    ranks = []
    for rank in range(2):
        with _load(node_address, batch_size=10, rank=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append([b.ids.copy() for b in loader.all_epochs()])
    tail = [ids for step in zip(*ranks, strict=True) for ids in step]
    with _load(node_address) as loader:
        order = np.concatenate([b.ids for b in loader.all_epochs()])
    assert np.concatenate(head + tail).tolist() == order.tolist()


def test_a_loader_can_be_set_back_while_it_runs(node_address: str) -> None:
    """load_state_dict restarts a loader exactly there, also while batches are in the making or held."""
    undisturbed = _run(node_address, epochs=2)
    with _load(node_address, epochs=2) as loader:
        start = loader.state_dict()
        kept = [next(loader.all_epochs()) for _ in range(3)]
        for _ in range(3):
            loader.load_state_dict(start)
            assert _content(next(loader.all_epochs())) == undisturbed[0]
        loader.load_state_dict(start)
        assert [_content(batch) for batch in loader.all_epochs()] == undisturbed
        assert [_content(batch) for batch in kept] == undisturbed[:3]


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 1}, "seed"), ({"view": View(jitter=0.2)}, "view"), ({"split": "val"}, "fingerprint")],
    ids=str,
)
def test_a_state_of_another_run_is_refused(node_address: str, change: dict[str, Any], what: str) -> None:
    """Another seed, view or dataset would give other samples; the error names the one that differs."""
    with _load(node_address) as loader:
        state = loader.state_dict()
    with _load(node_address, **change) as loader, pytest.raises(errors.StateError, match=what):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"position": -1}, {"position": 301}, {"epoch": "0"}, {"format": 2}, {"view": None}], ids=str
)
def test_a_damaged_state_is_refused(node_address: str, change: dict[str, Any]) -> None:
    """Every field of a saved state is checked."""
    with _load(node_address) as loader, pytest.raises(errors.StateError):
        loader.load_state_dict(loader.state_dict() | change)


def test_a_loop_after_a_break_continues(node_address: str) -> None:
    """A loop after a break continues with the next batch, and a finished loader stays finished."""
    undisturbed = _run(node_address, epochs=2)
    with _load(node_address, epochs=2) as loader:
        got = []
        for batch in loader.all_epochs():
            got.append(_content(batch))
            if len(got) == 3:
                break
        got += [_content(batch) for batch in loader.all_epochs()]
        assert list(loader.all_epochs()) == []
    assert got == undisturbed


def test_holding_every_slot_is_an_error_that_says_so(node_address: str) -> None:
    """Holding arrays from all slots raises SlotsHeld; releasing one of them lets the loader continue."""
    with _load(node_address, batch_size=10, prefetch=2) as loader:
        held = [next(loader.all_epochs()) for _ in range(4)]
        with pytest.raises(errors.SlotsHeld, match=r"all 4 slots.*copy\(\)"):
            next(loader.all_epochs())
        held.pop()
        gc.collect()
        assert next(loader.all_epochs()).start == 40


def test_held_batches_do_not_change(node_address: str) -> None:
    """No later batch is written to a slot whose arrays are alive."""
    undisturbed = _run(node_address, epochs=2)
    with _load(node_address, epochs=2, prefetch=3) as loader:
        first, third = next(loader.all_epochs()), [next(loader.all_epochs()), next(loader.all_epochs())][1]
        rest = [_content(batch) for batch in loader.all_epochs()]
        assert [_content(first), undisturbed[1], _content(third), *rest] == undisturbed


def test_closing_leaves_nothing_in_shared_memory(node_address: str, my_segments: Callable[[], set[Path]]) -> None:
    """The segment's name is removed by close, even while a batch is held, and when a loader is garbage-collected."""
    with _load(node_address) as loader:
        held = next(loader.all_epochs())
        assert len(my_segments()) == 1
    assert my_segments() == set()
    assert held.images.any()
    loader = _load(node_address)
    next(loader.all_epochs())
    assert len(my_segments()) == 1
    del loader, held
    gc.collect()
    assert my_segments() == set()


def test_without_a_node_it_waits_for_timeout_s() -> None:
    """With timeout_s a missing node is an error that says how to start one."""
    start = time.monotonic()
    with pytest.raises(errors.NoNodeError, match="loader-service start"):
        Loader("tcp://127.0.0.1:9", timeout_s=0.3)
    assert time.monotonic() - start < 5


def test_a_client_outlives_its_node(dataset_dir: Path, start_node: Callable[..., Any], tmp_path: Path) -> None:
    """A node that is killed during an epoch and replaced changes nothing: the same batches, each once."""
    bind = f"ipc://{tmp_path}/node"
    node = start_node(workers=2, bind=bind)
    undisturbed = _run(bind, epochs=3)
    with _load(bind, epochs=3, batch_size=64) as loader:
        got = [_content(next(loader.all_epochs())) for _ in range(2)]
        node.process.kill()
        node.process.wait()
        start_node(workers=1, bind=bind)
        got += [_content(batch) for batch in loader.all_epochs()]
        accounts = loader.ledger
    assert got == undisturbed
    assert [(a.delivered, a.expected) for a in accounts] == [(RECORDS, RECORDS)] * 3


def test_two_nodes_share_the_work(dataset_dir: Path, start_node: Callable[..., Any]) -> None:
    """Two nodes work for one loader; killing one of them changes the pace and nothing else."""
    first, second = start_node(workers=1), start_node(workers=1)
    undisturbed = _run(first.address, epochs=3)
    with _load(f"{first.address}, {second.address}", epochs=3) as loader:
        got = [_content(next(loader.all_epochs())) for _ in range(4)]
        second.process.kill()
        got += [_content(batch) for batch in loader.all_epochs()]
    assert got == undisturbed


def test_a_node_with_another_dataset_is_refused(
    start_node: Callable[..., Any],
    make_dataset: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[[Callable[[], bool], str], None],
) -> None:
    """A node with other data than the first is named with the difference and not used; the run goes on with the first."""
    make_dataset(tmp_path / "train.lmdb", 20)
    first = start_node()
    port = first.address.rpartition(":")[2]
    other = start_node(data=tmp_path, bind=f"tcp://127.0.0.2:{port}")
    expected = _run(first.address)
    known, real = ["127.0.0.1"], socket.getaddrinfo
    monkeypatch.setattr("loader_service.client.resolver.INTERVAL_S", 0.05)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda _, *rest, **named: [e for ip in known for e in real(ip, *rest, **named)]
    )
    with caplog.at_level(logging.WARNING), _load(f"tcp://localhost:{port}") as loader:
        known.append("127.0.0.2")  # after the first one was welcomed, which decides
        eventually(lambda: "fingerprint is" in caplog.text, "the other node is refused")
        assert [_content(batch) for batch in loader] == expected
    assert f"the node at {other.address} is refused: its dataset's fingerprint is " in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"split": "test"}, {"view": "none"}, {"batch_size": 0}, {"batch_size": 1.5}, {"seed": -1}, {"epochs": -1},
        {"dtype": "int8"}, {"rank": 1}, {"world_size": 0}, {"transport": "udp"}, {"prefetch": 0}, {"address": ""},
        {"on_bad_sample": "ignore"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_work_are_named(node_address: str, options: dict[str, Any]) -> None:
    """The error names the option, its value and the expected values."""
    (name,) = options
    with pytest.raises(errors.OptionError, match=f"^{name}="):
        Loader(**{"address": node_address, "timeout_s": 20} | options)


def test_a_split_that_is_not_served_is_refused(
    start_node: Callable[..., Any], make_dataset: Any, tmp_path: Path
) -> None:
    """The error lists the splits that the node has."""
    make_dataset(tmp_path / "train.lmdb", 20)
    with pytest.raises(errors.NodeRefused, match=r"list of splits is train"):
        _load(start_node(data=tmp_path).address, split="val")


# A sample of 9 x 9 pixels takes 263 bytes, and 332 with its label and draws aligned to 64 bytes.
SMALL_SLOTS = "import sys; from loader_service import defaults; defaults.SEND_SLOT_BYTES = int(sys.argv.pop(1)); from loader_service.cli import main; main(prog_name='loader-service')"  # fmt: skip


@pytest.mark.parametrize(("slot_bytes", "serves"), [(330, False), (391, True)])
def test_a_slice_of_one_sample_fits_its_send_slot_or_is_refused(
    dataset_dir: Path, slot_bytes: int, serves: bool
) -> None:
    """A send slot that is too small for one aligned sample is an error at the start; each other one serves."""
    view = View(crop=9, flip=False, jitter=0.0)
    program = (sys.executable, "-c", SMALL_SLOTS, str(slot_bytes))
    with LocalNode(dataset_dir, workers=1, program=program) as node:
        if serves:
            with _load(node.address, view=view, transport="tcp") as loader:
                assert sum(len(batch.labels) for batch in loader) == RECORDS
        else:
            with pytest.raises(errors.OptionError, match=f"samples that fit a send slot of {slot_bytes} bytes"):
                _load(node.address, view=view, transport="tcp")
