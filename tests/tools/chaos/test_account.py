"""The judgement of a client's journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loader_service import EpochAccount
from tools.chaos.account import EpochResult, results, undisturbed
from tools.chaos.client import BATCH_SIZE
from tools.chaos.journal import JournalEntry, Saved, save
from tools.errors import ToolFailed
from tools.sample_dataset import write

RECORDS, SEED = 100, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, RECORDS, 16)
    return folder


@pytest.fixture(scope="module")
def entries(data: Path) -> list[JournalEntry]:
    count, entries = undisturbed(data, SEED, 1)
    assert count == RECORDS
    assert len(entries[0]) == -(-RECORDS // BATCH_SIZE)
    return entries[0]


@pytest.fixture
def judge(data: Path, tmp_path: Path) -> Callable[[list[JournalEntry]], EpochResult]:
    """Provide ``judge(entries)``: the result of one epoch whose journal has these entries."""

    def run(entries: list[JournalEntry]) -> EpochResult:
        (tmp_path / "journal.jsonl").write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
        account = EpochAccount(0, RECORDS, delivered=sum(len(entry.ids) for entry in entries))
        save(tmp_path, Saved({}, len(entries), [account], 1, 0))
        return results(data, SEED, tmp_path)[0]

    return run


def test_an_undisturbed_epoch_is_flawless(judge: Callable[..., EpochResult], entries: list[JournalEntry]) -> None:
    """The journal of an undisturbed epoch equals that of another undisturbed epoch."""
    assert judge(entries).flawless


def test_a_lost_batch_is_found(judge: Callable[..., EpochResult], entries: list[JournalEntry]) -> None:
    """A batch that the journal lacks counts by its samples."""
    result = judge(entries[:-1])
    assert (result.lost, result.twice, result.differing) == (len(entries[-1].ids), 0, 1)
    assert not result.flawless


def test_a_batch_twice_is_found(judge: Callable[..., EpochResult], entries: list[JournalEntry]) -> None:
    """A batch that the journal has twice counts by its samples."""
    result = judge([*entries, entries[-1]])
    assert (result.lost, result.twice, result.differing) == (0, len(entries[-1].ids), 1)


def test_one_wrong_byte_is_found(judge: Callable[..., EpochResult], entries: list[JournalEntry]) -> None:
    """A batch of other bytes differs, although its records are right."""
    other = msgspec.structs.replace(entries[0], digest="0" * 32)
    assert (judge([other, *entries[1:]]).differing, judge(entries).differing) == (1, 0)


def test_an_empty_journal_is_an_error(judge: Callable[..., EpochResult]) -> None:
    """A client that received nothing fails the run; it has no epoch that could differ."""
    with pytest.raises(ToolFailed, match="nothing was delivered"):
        judge([])
