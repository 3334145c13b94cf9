"""The results of a run in one small file, RUN/summary.json."""

from __future__ import annotations

import msgspec

from trainer.run.ledger import Account


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
    ledger: list[Account]
    checkpoint: str
    log: str
    figures: list[str]

    @property
    def is_exact(self) -> bool:
        """Whether the run is over and every sample of every epoch was seen exactly once."""
        return self.finished and all(account.delivered == account.expected for account in self.ledger)
