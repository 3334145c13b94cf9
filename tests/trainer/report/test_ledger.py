"""The ledger of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from loader_service import EpochAccount
from trainer.report import ledger
from trainer.report.records import RunRecord


def test_the_ledger_says_if_every_sample_came_once(record: RunRecord, words: Callable[[str], list[str]]) -> None:
    """A complete ledger says so; refused, repeated and replaced samples are shown only if there are any."""
    figure = ledger.figure(record)
    assert figure is not None
    assert figure.caption.startswith("Every sample of every epoch was delivered exactly once.")
    assert figure.table[1] == ["1", "300", "300", "0", "0", "0"]
    assert "Refused, repeated and replaced" not in words(figure.svg())
    assert record.summary is not None
    accounts = [EpochAccount(0, 300, 300, 1, 2, 3), EpochAccount(1, 300, 64)]
    torn = ledger.figure(replace(record, summary=msgspec.structs.replace(record.summary, ledger=accounts)))
    assert torn is not None
    assert torn.caption.startswith("1 of 2 epochs are complete")
    assert "Refused, repeated and replaced" in words(torn.svg())
    assert ledger.figure(replace(record, summary=None, checkpoint=None)) is None
