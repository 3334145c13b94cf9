"""A profile of a few training steps, as a trace file that Perfetto opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED_STEPS: Final = 2
"""Steps before the profile: the first ones compile, record graphs, choose kernels and allocate memory."""

_WARM_UP_STEPS: Final = 1
"""Steps that the profiler runs without recording, since its own start is slow."""


class StepProfiler:
    """A profiler of a process's first steps after SKIPPED_STEPS; use it as a context manager.

    Args:
        path: file of the trace, Chrome's JSON; an older one is replaced.
        steps: steps to record; 0 makes the profiler do nothing.
        say: function that prints a line for the user.
    """

    def __init__(self, path: Path, steps: int, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._left = SKIPPED_STEPS + _WARM_UP_STEPS + steps if steps else 0
        self._profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = schedule(wait=SKIPPED_STEPS, warmup=_WARM_UP_STEPS, active=steps, repeat=1)
            self._profile = profile(
                activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True
            )
        self._written = False

    def __enter__(self) -> StepProfiler:
        if self._profile:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self) -> None:
        """Note the end of a step; after the last recorded one, write the trace."""
        if self._profile is None:
            return
        self._profile.step()
        self._left -= 1
        if not self._left:
            self._stop()

    def _stop(self) -> None:
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()  # writes what a run that ends early has recorded
        if not self._written:
            self._say(f"No profile: the run ended within {SKIPPED_STEPS + _WARM_UP_STEPS} steps.")

    def _write(self, recorded: profile) -> None:
        recorded.export_chrome_trace(str(self._path))
        self._written = True
        self._say(f"Profile: {self._path}. Open it at https://ui.perfetto.dev or in chrome://tracing.")
