"""Results of a run as tools read them, and the check of its ledger."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loader_service import EpochAccount
from tools.errors import ToolFailed
from tools.results import check, decode, ledger_line, read_summary
from trainer.run.summary import Summary


def summary(*ledger: EpochAccount, finished: bool = True) -> Summary:
    """A run's summary with this ledger."""
    return Summary(finished, len(ledger), 4, 0.5, 0.9, 0.6, 0.1, 200.0, 0.01, list(ledger), "c", "l", [])


def account(delivered: int, epoch: int = 0) -> EpochAccount:
    """An epoch's account of 100 samples."""
    return EpochAccount(epoch, 100, delivered, 1, 2)


def test_a_run_that_saw_every_sample_once_passes() -> None:
    """All expected samples were delivered in every epoch."""
    check(summary(account(100), account(100, 1)))


@pytest.mark.parametrize("delivered", [99, 101])
def test_a_sample_too_few_or_too_many_is_refused(delivered: int) -> None:
    """The error names the epoch's figures."""
    with pytest.raises(ToolFailed, match=f"epoch 1 delivered {delivered} of 100 samples"):
        check(summary(account(100), account(delivered, 1)))


def test_an_unfinished_run_is_refused() -> None:
    """A trainer that was stopped ends with exit code 0; that is no success of the demo."""
    with pytest.raises(ToolFailed, match="stopped before its last epoch"):
        check(summary(account(100), finished=False))


def test_a_run_without_accounts_is_refused() -> None:
    """Nothing delivered of nothing expected proves nothing."""
    with pytest.raises(ToolFailed, match="no account of any epoch"):
        check(summary())


def test_a_summary_is_read_as_the_trainer_writes_it(tmp_path: Path) -> None:
    """The tool decodes the trainer's own type, and its ledger is summed in one line."""
    path = tmp_path / "summary.json"
    written = summary(account(100), account(100, 1))
    path.write_bytes(msgspec.json.encode(written))
    assert read_summary(path) == written
    assert ledger_line(written) == "200 of 200 samples in 2 epochs (2 duplicates refused, 4 slices asked for again)"


def test_a_summary_without_its_fields_is_refused(tmp_path: Path) -> None:
    """A missing file and missing fields are each one sentence."""
    with pytest.raises(ToolFailed, match=r"left no .*summary\.json that can be read: No such file"):
        read_summary(tmp_path / "summary.json")
    with pytest.raises(ToolFailed, match=r"summary\.json is not what this tool expects"):
        decode(b'{"finished": true, "ledger": []}', Summary, "summary.json")
