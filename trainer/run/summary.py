"""The results of a run, RUN/summary.json, and the merging of its epochs' accounts over resumes and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from loader_service.types import EpochAccount

_COUNTS: Final = len(EpochAccount.__struct_fields__) - 1
"""Counts in an account: all its fields but the epoch."""


def merge_accounts(earlier: Sequence[EpochAccount], later: Sequence[EpochAccount]) -> list[EpochAccount]:
    """Return the accounts of a resumed run.

    An epoch in both was interrupted: its earlier account expected the whole epoch, the later one the rest.
    """
    merged = {account.epoch: account for account in earlier}
    for account in later:
        first = merged.get(account.epoch)
        merged[account.epoch] = account if first is None else first.continued(account)
    return [merged[epoch] for epoch in sorted(merged)]


def as_numbers(accounts: Sequence[EpochAccount], epochs: Sequence[int]) -> list[float]:
    """Return the counts of ``epochs`` in one list, zeros for a missing account; ``from_numbers`` inverts it."""
    known = {account.epoch: msgspec.structs.astuple(account)[1:] for account in accounts}
    return [count for epoch in epochs for count in known.get(epoch, (0,) * _COUNTS)]


def from_numbers(rows: Sequence[Sequence[float]], epochs: Sequence[int]) -> list[EpochAccount]:
    """Return the accounts of ``epochs``, summed over the processes, one row each, which share the samples."""
    sums = [int(sum(column)) for column in zip(*rows, strict=True)]
    counts = [sums[i : i + _COUNTS] for i in range(0, len(sums), _COUNTS)]
    return [EpochAccount(epoch, *of_epoch) for epoch, of_epoch in zip(epochs, counts, strict=True) if any(of_epoch)]


class Summary(msgspec.Struct, frozen=True):
    """The results of a run so far.

    Fields:
        finished: True when all epochs are complete.
        epochs, steps: numbers completed.
        accuracy, top5_accuracy: on the validation split after the last epoch, centre crop, 0 to 1; None before the first.
        best_accuracy: highest ``accuracy`` of all epochs.
        chance: accuracy of guessing, 1 / number of classes.
        images_per_s: training images per second, waiting included.
        waiting_share: fraction of the training time spent waiting for data, 0 to 1.
        ledger: accounts of the epochs begun: samples expected, delivered, and so on.
        checkpoint, log, figures: paths of the run's files.
    """

    finished: bool
    epochs: int
    steps: int
    accuracy: float | None
    top5_accuracy: float | None
    best_accuracy: float | None
    chance: float
    images_per_s: float
    waiting_share: float
    ledger: list[EpochAccount]
    checkpoint: str
    log: str
    figures: list[str]

    @property
    def is_exact(self) -> bool:
        """True if the run is complete and saw every sample of every epoch exactly once."""
        return self.finished and all(account.delivered == account.expected for account in self.ledger)
