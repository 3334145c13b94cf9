"""The learning rate of every step.

The paper's rule: "divide by 10 when the validation error rate stopped improving" (section 5), by hand. Beside it stand
steps at fixed epochs and half a cosine, a warm-up before any of them, and the hand itself (``trainer set-lr``).

A schedule is a value. An epoch's validation error, or a rate set by hand, comes in; the next schedule comes out.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, Literal, get_args

import msgspec

from trainer.errors import ConfigError

Policy = Literal["plateau", "step", "cosine"]

FACTOR: Final = 0.1

MAX_DROPS: Final = 3
"""The paper's rate was reduced three times before the end of training."""

_WARMUP_START: Final = 0.01
"""Share of the rate that a warm-up starts with."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the learning rate, and what it has seen so far.

    Fields:
        lr: the rate before warm-up and policy have their say; ``plateau`` lowers it.
        policy: ``plateau`` drops the rate by FACTOR after ``patience`` epochs without a better error, at most MAX_DROPS
            times; ``step`` drops it at fixed epochs; ``cosine`` lets it fall from the first epoch to the last.
        patience: epochs without improvement that bring a drop.
        drop_at: epochs at whose start ``step`` drops, in order.
        warmup: epochs in which the rate rises in a straight line; may be a fraction.
        best: the lowest validation error so far, None before the first.
        stalled: epochs since ``best``, or since the last drop.
        drops: how many drops of the plateau there have been.
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
        """The learning rate of a step.

        Args:
            epoch: epochs done before it, with the share done of the one under way.
            epochs: how many there will be.
        """
        return self.lr * self._warmup_factor(epoch) * self._decay_factor(epoch, epochs)

    def after_epoch(self, error: float) -> Schedule:
        """The schedule for the next epoch, after one that ended at validation error ``error`` (0 to 1)."""
        if self.improves(error):
            return msgspec.structs.replace(self, best=error, stalled=0)
        stalled = self.stalled + 1
        if self.policy != "plateau" or stalled < self.patience or self.drops == MAX_DROPS:
            return msgspec.structs.replace(self, stalled=stalled)
        return msgspec.structs.replace(self, lr=self.lr * FACTOR, stalled=0, drops=self.drops + 1)

    def improves(self, error: float) -> bool:
        """Whether ``error`` is better than every epoch's before; NaN never is."""
        return error < (math.inf if self.best is None else self.best)

    def by_hand(self, rate: float, epoch: float, epochs: int) -> Schedule:
        """The schedule whose rate is ``rate`` now, and in proportion later; a warm-up is over."""
        return msgspec.structs.replace(self, lr=rate / self._decay_factor(epoch, epochs), warmup=0.0, stalled=0)

    def _warmup_factor(self, epoch: float) -> float:
        return 1.0 if epoch >= self.warmup else _WARMUP_START + (1 - _WARMUP_START) * epoch / self.warmup

    def _decay_factor(self, epoch: float, epochs: int) -> float:
        if self.policy == "step":
            return FACTOR ** sum(epoch >= drop for drop in self.drop_at)
        if self.policy == "cosine":
            return (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2
        return 1.0
