"""Detection of divergence, before damaged weights replace good checkpoints, and of a training that does not start.

Two conditions are checked with every log line and before every checkpoint:

1. The loss, all weights and all momentum buffers are finite.
2. The mean loss since the last log line is at most EXPLODED times the loss of guessing, ln(classes). An untrained network
   has that loss; a far higher one means confident wrong answers for almost all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trainer.errors import TrainingDiverged
from trainer.parallel.world import World
from trainer.run.param_stats import ParamStats, measure, suspect
from trainer.run.progress import StepRecord, Tally
from trainer.run.state import State

EXPLODED: Final = 10.0
"""Limit as a multiple of the loss of guessing. Runs have recovered from above 3, none from above 10."""


STARTED_BY: Final = 300
"""Steps after which the loss should have left that of guessing; docs/alexnet.md has measurements."""

STILL_GUESSING: Final = 0.98
"""A mean loss above this multiple of ln(classes) is that of guessing."""


def start_warning(record: StepRecord, first_step: int, classes: int) -> str | None:
    """Return a sentence for the first log line after STARTED_BY steps if the network still guesses; else None.

    Args:
        record: the log line.
        first_step: step after which its interval began.
        classes: number of classes.
    """
    guessing = math.log(classes)
    if not first_step < STARTED_BY <= record.step or classes < 2 or record.loss <= STILL_GUESSING * guessing:
        return None
    return (
        f"The loss after {record.step} steps, {record.loss:.2f}, is not below that of guessing, ln {classes} = "
        f"{guessing:.2f}. What helps: --batch-size 32, --lr .02, or --preset original, whose wider weights start sooner."
    )


class DivergenceMonitor:
    """A monitor of one training.

    Args:
        state: state of the training.
        world: processes of the run; all of them call ``check``.
    """

    def __init__(self, state: State, world: World) -> None:
        self._state, self._world = state, world
        self._limit = EXPLODED * math.log(max(2, len(state.facts.class_names)))
        self._step = -1  # of the last check; none yet
        self.param_stats: dict[str, ParamStats] = {}
        """Parameter statistics of the last check."""

    def check(self, since: Tally, newest: Callable[[], Path | None]) -> None:
        """Measure all parameters, once per step, and check both conditions.

        Args:
            since: sums over the steps since the last log line.
            newest: function that returns the last good checkpoint, for the error.

        Raises:
            TrainingDiverged: a condition is violated.
        """
        step = self._state.progress.step
        if step == self._step:
            return
        before, self.param_stats = self.param_stats, measure(self._state.model, self._state.optimizer, self._world)
        self._step = step
        loss = since.mean_loss if since.images else 0.0
        if not all(layer.is_finite for layer in self.param_stats.values()):
            loss = math.nan
        if not loss <= self._limit:  # also true of NaN
            raise TrainingDiverged(step, loss, suspect(self.param_stats, before), newest())
