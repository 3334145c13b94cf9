"""Learning rate schedules.

The authors divided the rate by 10 "when the validation error rate stopped improving with the current learning rate"
(section 5), by hand. ``plateau`` applies that rule; ``step`` and ``cosine`` are alternatives. A warm-up may precede any of
them, and ``trainer set-lr`` sets the rate by hand.

A schedule is an immutable value: ``after_epoch`` takes a validation error and returns the next schedule, ``by_hand`` does
so with a rate.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, Literal, get_args

import msgspec

from trainer.errors import ConfigError

Policy = Literal["plateau", "step", "cosine"]

FACTOR: Final = 0.1
"""Factor of one drop (paper section 5)."""

MAX_DROPS: Final = 3
"""The paper reduced the rate three times before the end of training (section 5)."""

_WARMUP_START: Final = 0.01
"""Fraction of the rate at the start of a warm-up; not 0, so that the first step moves the weights."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rule for the learning rate, and the results that it has seen so far.

    Fields:
        lr: base rate, before warm-up and policy apply; ``plateau`` lowers it.
        policy: ``plateau`` multiplies the rate by FACTOR after ``patience`` epochs without a better error, at most
            MAX_DROPS times; ``step`` does so at fixed epochs; ``cosine`` lowers it from the first epoch to the last.
        patience: epochs without improvement before a drop.
        drop_at: epochs at whose start ``step`` drops the rate, in rising order.
        warmup: epochs of linear warm-up; may be a fraction.
        best: lowest validation error so far, 0 to 1; None before the first epoch ends.
        stalled: epochs since ``best`` or since the last drop.
        drops: drops made by ``plateau``.
    """

    lr: float
    policy: Policy = "plateau"
    patience: int = 5
    drop_at: tuple[int, ...] = ()
    warmup: float = 0.0
    best: float | None = None
    stalled: int = 0
    drops: int = 0

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ConfigError("--schedule", self.policy, f"one of {', '.join(get_args(Policy))}")
        if any(b <= a for a, b in pairwise((0, *self.drop_at))):
            raise ConfigError(
                "--drop-at", ",".join(map(str, self.drop_at)), "rising epochs from 1 on, such as 30,60,80"
            )
        if bool(self.drop_at) != (self.policy == "step"):
            raise ConfigError("--schedule", self.policy, "--drop-at with step, and with step alone")
        if not 0 <= self.warmup <= 1000:
            raise ConfigError("--warmup", self.warmup, "0 to 1000 epochs")

    def rate(self, epoch: float, epochs: int) -> float:
        """Return the learning rate of a step.

        Args:
            epoch: epochs completed before the step, with the completed fraction of the current one.
            epochs: total number of epochs.
        """
        return self.lr * self._warmup_factor(epoch) * self._decay_factor(epoch, epochs)

    def after_epoch(self, error: float) -> Schedule:
        """Return the schedule of the next epoch, given the validation error of this one, 0 to 1."""
        if self.improves(error):
            return msgspec.structs.replace(self, best=error, stalled=0)
        stalled = self.stalled + 1
        # Drops end at MAX_DROPS: further ones would only stop the learning.
        if self.policy != "plateau" or stalled < self.patience or self.drops == MAX_DROPS:
            return msgspec.structs.replace(self, stalled=stalled)
        return msgspec.structs.replace(self, lr=self.lr * FACTOR, stalled=0, drops=self.drops + 1)

    def improves(self, error: float) -> bool:
        """Return True if ``error`` is lower than that of all earlier epochs; NaN never is."""
        return error < (math.inf if self.best is None else self.best)

    def by_hand(self, rate: float, epoch: float, epochs: int) -> Schedule:
        """Return the schedule whose rate is ``rate`` now and changes in proportion later; it ends a warm-up."""
        # Divided by the policy's current factor, so that the rate is exactly ``rate`` now.
        return msgspec.structs.replace(self, lr=rate / self._decay_factor(epoch, epochs), warmup=0.0, stalled=0)

    def _warmup_factor(self, epoch: float) -> float:
        return 1.0 if epoch >= self.warmup else _WARMUP_START + (1 - _WARMUP_START) * epoch / self.warmup

    def _decay_factor(self, epoch: float, epochs: int) -> float:
        if self.policy == "step":
            return FACTOR ** sum(epoch >= drop for drop in self.drop_at)  # one factor for each drop passed
        if self.policy == "cosine":
            return (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2  # 1 at the start, 0 at the end
        return 1.0  # plateau lowers ``lr`` itself
