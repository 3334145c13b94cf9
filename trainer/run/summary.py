"""The results of a run, RUN/summary.json, and the accounts of its epochs over all the pieces that it was made in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from loader_service.types import EpochAccount

_COUNTS: Final = len(EpochAccount.__struct_fields__) - 1


def merge_accounts(earlier: Sequence[EpochAccount], later: Sequence[EpochAccount]) -> list[EpochAccount]:
    """The accounts of a run that was left and resumed.

    An epoch in both was left in its middle: the earlier part expected all of it, the later what was left.
    """
    merged = {account.epoch: account for account in earlier}
    for account in later:
        first = merged.get(account.epoch)
        merged[account.epoch] = account if first is None else first.continued(account)
    return [merged[epoch] for epoch in sorted(merged)]


def as_numbers(accounts: Sequence[EpochAccount], epochs: Sequence[int]) -> list[float]:
    """The counts of ``epochs`` one after the other, zeros where there is no account; the inverse of ``from_numbers``."""
    known = {account.epoch: msgspec.structs.astuple(account)[1:] for account in accounts}
    return [count for epoch in epochs for count in known.get(epoch, (0,) * _COUNTS)]


def from_numbers(everyone: Sequence[Sequence[float]], epochs: Sequence[int]) -> list[EpochAccount]:
    """The accounts of ``epochs``, added up over the processes that each had a part of the samples."""
    sums = [int(sum(column)) for column in zip(*everyone, strict=True)]
    counts = [sums[i : i + _COUNTS] for i in range(0, len(sums), _COUNTS)]
    return [EpochAccount(epoch, *of_epoch) for epoch, of_epoch in zip(epochs, counts, strict=True) if any(of_epoch)]


class Summary(msgspec.Struct, frozen=True):
    """What a run reached so far.

    Fields:
        finished: whether all epochs are over.
        epochs, steps: done.
        accuracy, top5_accuracy: shares of the validation split after the last epoch, centre crop; None before the first.
        best_accuracy: the highest ``accuracy`` of any epoch.
        chance: the accuracy of guessing, 1 / number of classes.
        images_per_s: trained on, waiting included.
        waiting_share: share of the training time spent waiting for data, 0 to 1.
        ledger: of each epoch begun: samples delivered, expected, and so on.
        checkpoint, log, figures: paths of what the run made.
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
        """Whether the run is over and every sample of every epoch was seen exactly once."""
        return self.finished and all(account.delivered == account.expected for account in self.ledger)
