"""Tests of bad records: the run names them or replaces them by a rule, and never hides them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from loader_service import Loader, errors

RECORDS, BAD = 60, (7, 41)
StartNode = Callable[..., Any]


def _damage(path: Path, records: tuple[int, ...]) -> None:
    """Truncate the JPEG payloads of some records."""
    env = lmdb.open(str(path), max_dbs=3)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        for record in records:
            key = record.to_bytes(8, "big")
            txn.put(key, txn.get(key)[:200])
    env.close()


@pytest.fixture(scope="module")
def sound_dir(tmp_path_factory: pytest.TempPathFactory, make_dataset: Any) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    make_dataset(directory / "train.lmdb", RECORDS, codec="jpeg")
    return directory


@pytest.fixture
def damaged_dir(sound_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound_dir / "train.lmdb", tmp_path / "damaged" / "train.lmdb")
    _damage(tmp_path / "damaged" / "train.lmdb", BAD)
    return tmp_path / "damaged"


def _load(address: str, **options: Any) -> Loader:
    return Loader(address, **{"timeout_s": 20, "batch_size": 16, "seed": 4, "epochs": 1} | options)


def _run(loader: Loader) -> list[tuple[bytes, list[int], list[int], list[int]]]:
    return [(b.images.tobytes(), b.labels.tolist(), b.ids.tolist(), b.sources.tolist()) for b in loader.all_epochs()]


def test_a_bad_record_stops_the_run_by_name(start_node: StartNode, damaged_dir: Path) -> None:
    """By default the error names the record, its source file, the node and the reason."""
    node = start_node(data=damaged_dir)
    with pytest.raises(errors.RecordError) as caught, _load(node.address) as loader:
        list(loader.all_epochs())
    assert caught.value.record in BAD
    assert caught.value.source == f"{('ant', 'bee', 'cat')[caught.value.record % 3]}/{caught.value.record}.jpg"
    assert caught.value.source in str(caught.value)
    assert node.address in str(caught.value)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_bad_records_are_replaced_by_a_rule(start_node: StartNode, damaged_dir: Path, transport: Any) -> None:
    """Batches keep their size and ids; sources and labels are the replacements'; all replacements are counted and named."""
    node = start_node(data=damaged_dir)
    with _load(node.address, on_bad_sample="substitute", epochs=2, transport=transport) as loader:
        batches = _run(loader)
        assert {q.record for q in loader.quarantine} == set(BAD)
        assert all(q.source.endswith(f"{q.record}.jpg") and q.reason for q in loader.quarantine)
        assert [(a.delivered, a.expected, a.substituted) for a in loader.ledger] == [(RECORDS, RECORDS, 2)] * 2
    ids = np.concatenate([b[2] for b in batches]).reshape(2, RECORDS)
    sources = np.concatenate([b[3] for b in batches]).reshape(2, RECORDS)
    labels = np.concatenate([b[1] for b in batches]).reshape(2, RECORDS)
    assert [sorted(epoch) for epoch in ids.tolist()] == [list(range(RECORDS))] * 2
    assert set(ids[sources != ids]) == set(BAD)
    assert not np.isin(sources, BAD).any()
    assert (labels == sources % 3).all()


def test_the_same_exclusions_give_the_same_bytes_after_a_resume(start_node: StartNode, damaged_dir: Path) -> None:
    """A state carries the exclusions, so a resumed run delivers the same batches as the run that it continues."""
    node = start_node(data=damaged_dir, workers=2)
    with _load(node.address, on_bad_sample="substitute", epochs=3) as loader:
        everything = _run(loader)
    with _load(node.address, on_bad_sample="substitute", epochs=3) as loader:
        for _ in range(6):
            next(loader.all_epochs())
        state = loader.state_dict()
    assert state["exclusions"] == list(BAD)
    with _load(node.address, on_bad_sample="substitute", epochs=3, transport="tcp") as loader:
        loader.load_state_dict(state)
        assert _run(loader) == everything[6:]
        assert loader.quarantine == []  # the exclusions came with the state, so nothing new was found


def test_what_one_node_cannot_read_another_may(start_node: StartNode, damaged_dir: Path, sound_dir: Path) -> None:
    """If one node's disk is damaged and another's is not, nothing is replaced and the run continues."""
    sound, damaged = start_node(data=sound_dir), start_node(data=damaged_dir)
    with _load(sound.address, epochs=2) as loader:
        undisturbed = _run(loader)
    with _load(f"{damaged.address},{sound.address}", epochs=2) as loader:
        assert _run(loader) == undisturbed


@pytest.mark.parametrize("codec", ["raw", "jpeg", "centered"])
@pytest.mark.parametrize("byte", [0, -1], ids=["label", "payload"])
def test_one_flipped_bit_is_a_bad_record(
    start_node: StartNode, make_dataset: Any, tmp_path: Path, codec: str, byte: int
) -> None:
    """A record with one flipped bit is bad in every codec: the run names it and says what to do, or replaces it by a rule."""
    make_dataset(tmp_path / "train.lmdb", 20, codec=codec, side=64)
    env = lmdb.open(str(tmp_path / "train.lmdb"), max_dbs=3)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        value = bytearray(txn.get((7).to_bytes(8, "big")))
        value[byte] ^= 1
        txn.put((7).to_bytes(8, "big"), bytes(value))
    env.close()
    node = start_node(data=tmp_path, workers=2)
    with (
        pytest.raises(
            errors.RecordError, match=r"record 7 \(bee/7.jpg\).*damaged: its checksum does not match; `loader-"
        ),
        _load(node.address, crop=56) as loader,
    ):
        list(loader)
    with _load(node.address, crop=56, on_bad_sample="substitute", epochs=2) as loader:
        _run(loader)
        assert [(q.record, q.source) for q in loader.quarantine] == [(7, "bee/7.jpg")]
        assert "its checksum does not match" in loader.quarantine[0].reason
        assert [(a.delivered, a.substituted) for a in loader.ledger] == [(20, 1)] * 2


def test_more_than_max_bad_is_an_error_all_the_same(start_node: StartNode, damaged_dir: Path) -> None:
    """With max_bad=1 the second bad record ends the run, and the error says what to do."""
    node = start_node(data=damaged_dir)
    with pytest.raises(errors.TooManyBadRecords, match=r"2 records are bad, and max_bad allows 1.*loader-service verify"), _load(node.address, on_bad_sample="substitute", max_bad=1) as loader:  # fmt: skip
        list(loader.all_epochs())


def test_a_dataset_truncated_in_use_ends_its_node_and_loses_nothing(
    start_node: StartNode, sound_dir: Path, tmp_path: Path, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """Reading past the end of a truncated file raises SIGBUS; the node names the cause and ends, and another takes over."""
    shutil.copytree(sound_dir / "train.lmdb", tmp_path / "train.lmdb")
    data = tmp_path / "train.lmdb" / "data.mdb"
    sound, truncated = start_node(data=sound_dir), start_node(data=tmp_path)
    with _load(sound.address, epochs=2) as loader:
        undisturbed = _run(loader)
    os.truncate(data, data.stat().st_size // 2)

    def run_disturbed() -> bool:
        with _load(f"{truncated.address},{sound.address}", epochs=2) as loader:
            assert _run(loader) == undisturbed
        return truncated.process.poll() is not None

    eventually(run_disturbed, "the node with the truncated file has ended")
    code, said = truncated.stop()
    assert code == errors.NodeFailed.exit_code
    assert "SIGBUS" in said
    assert "data.mdb is truncated" in said


def test_a_dataset_replaced_in_use_is_never_mixed_with_the_old_one(
    start_node: StartNode,
    sound_dir: Path,
    make_dataset: Any,
    tmp_path: Path,
    eventually: Callable[[Callable[[], bool], str], None],
) -> None:
    """Workers keep the records that they have open; a new worker finds others at that path, and the node ends."""
    shutil.copytree(sound_dir / "train.lmdb", tmp_path / "train.lmdb")
    node = start_node(data=tmp_path, workers=2)
    with _load(node.address, epochs=2) as loader:
        undisturbed = _run(loader)
    make_dataset(tmp_path / "train.lmdb", RECORDS, codec="jpeg", class_names=("other",))
    with _load(node.address, epochs=2) as loader:
        assert _run(loader) == undisturbed
    node.workers()[0].kill()
    eventually(lambda: node.process.poll() is not None, "the node ends")
    code, said = node.stop()
    assert code == errors.NodeFailed.exit_code
    assert "it was replaced while this node serves it" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "exclusions",
    [None, [-1], [RECORDS], ["7"], list(range(2000))],
    ids=["none", "negative", "too large", "text", "too many"],
)
def test_exclusions_of_a_state_are_checked(start_node: StartNode, sound_dir: Path, exclusions: Any) -> None:
    """A state with impossible exclusions is refused."""
    with _load(start_node(data=sound_dir).address) as loader, pytest.raises(errors.StateError, match="exclusions"):
        loader.load_state_dict(loader.state_dict() | {"exclusions": exclusions})
