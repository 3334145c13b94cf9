"""When the learning rate drops: "divide by 10 when the validation error rate stopped improving" (paper section 5).

A schedule is a value. An epoch's validation error comes in, the next schedule comes out.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

FACTOR: Final = 0.1

MAX_DROPS: Final = 3
"""The paper's rate was reduced three times before the end of training."""


class Plateau(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drops the learning rate by FACTOR after ``patience`` epochs without a better error, at most MAX_DROPS times.

    Fields:
        lr: the learning rate now.
        patience: epochs without improvement that bring a drop.
        best: the lowest validation error so far, None before the first.
        stalled: epochs since ``best``, or since the last drop.
        drops: how many drops there have been.
    """

    lr: float
    patience: int
    best: float | None = None
    stalled: int = 0
    drops: int = 0

    def after_epoch(self, error: float) -> Plateau:
        """The schedule for the next epoch, after one that ended at validation error ``error`` (0 to 1)."""
        if self.improves(error):
            return msgspec.structs.replace(self, best=error, stalled=0)
        stalled = self.stalled + 1
        if stalled < self.patience or self.drops == MAX_DROPS:
            return msgspec.structs.replace(self, stalled=stalled)
        return msgspec.structs.replace(self, lr=self.lr * FACTOR, stalled=0, drops=self.drops + 1)

    def improves(self, error: float) -> bool:
        """Whether ``error`` is better than every epoch's before; NaN never is."""
        return error < (math.inf if self.best is None else self.best)
