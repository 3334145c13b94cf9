"""Notices that a training has gone wrong, before its weights push out good checkpoints.

Two rules, looked at with every line of the log and before every checkpoint:

1. The loss, and every weight and momentum, is a number.
2. The mean loss since the line before is at most EXPLODED times what guessing gives, ln(classes). A network that answers
   nothing has that loss; to be so far above it, it must be sure of wrong answers nearly everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trainer.errors import TrainingDiverged
from trainer.parallel.world import World
from trainer.run.param_stats import ParamStats, measure, suspect
from trainer.run.progress import Tally
from trainer.run.state import State

EXPLODED: Final = 10.0
"""Times the loss of guessing. Losses that came back from above 3 times have been seen, from above 10 none."""


class DivergenceMonitor:
    """Looks at one training.

    Args:
        state: the training.
        world: its processes; all of them call ``look``.
    """

    def __init__(self, state: State, world: World) -> None:
        self._state, self._world = state, world
        self._limit = EXPLODED * math.log(max(2, len(state.facts.class_names)))
        self._step = -1
        self.param_stats: dict[str, ParamStats] = {}
        """What the last look saw."""

    def check(self, since: Tally, newest: Callable[[], Path | None]) -> None:
        """Measure every parameter, once a step, and judge.

        Args:
            since: sums over the steps since the last line of the log.
            newest: finds the checkpoint to go back to.

        Raises:
            TrainingDiverged: one of the rules is broken.
        """
        step = self._state.progress.step
        if step == self._step:
            return
        before, self.param_stats = self.param_stats, measure(self._state.model, self._state.optimizer, self._world)
        self._step = step
        loss = since.mean_loss if since.images else 0.0
        if not all(layer.is_finite for layer in self.param_stats.values()):
            loss = math.nan
        if not loss <= self._limit:
            raise TrainingDiverged(step, loss, suspect(self.param_stats, before), newest())
