"""Where the time of a slice goes, stage by stage."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.types import STAGES, StageSeconds

READ, DECODE, AUGMENT = range(len(STAGES))
NO_STAGE: Final = -1


class Stopwatch:
    """Adds up the seconds spent in each stage; entering a stage leaves the one before.

    It costs a fifth of a microsecond per change of stage: three changes per slice of raw records, three per jpeg record.

    Args:
        shown: (1,) int64; holds the number of the stage that is being worked at, or NO_STAGE, for others to see.
    """

    __slots__ = ("_seconds", "_shown", "_since", "_stage")

    def __init__(self, shown: npt.NDArray[np.int64] | None = None) -> None:
        self._shown = np.empty(1, np.int64) if shown is None else shown
        self._seconds = [0.0] * len(STAGES)
        self._stage, self._since = NO_STAGE, 0.0
        self._shown[0] = NO_STAGE

    def enter(self, stage: int) -> None:
        """A stage begins (or, with NO_STAGE, nothing that is measured); the one before ends."""
        now = time.perf_counter()
        if self._stage != NO_STAGE:
            self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
        self._shown[0] = stage

    def spent(self, stage: int) -> float:
        """Seconds in a stage since the last stop, but for the one that runs."""
        return self._seconds[stage]

    def stop(self) -> StageSeconds:
        """End the stage that runs; what each has taken since the last stop."""
        self.enter(NO_STAGE)
        seconds = StageSeconds(*self._seconds)
        self._seconds = [0.0] * len(STAGES)
        return seconds
