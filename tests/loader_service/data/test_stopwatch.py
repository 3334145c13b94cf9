"""Where a slice's time is said to go."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import Records
from loader_service.data.stopwatch import DECODE, NO_STAGE, READ, Stopwatch
from loader_service.types import STAGES, SampleLayout, SliceId, StageSeconds, View

CENTER = View.named("center")


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_the_stages_make_up_the_whole(make_dataset: Any, tmp_path: Path, codec: str) -> None:
    """Read, decode and augment add up to the time that a slice takes; raw records are never decoded, jpeg ones mostly."""
    make_dataset(tmp_path / "train.lmdb", 128, codec)
    watch = Stopwatch()
    out = empty_slice(SampleLayout(CENTER, "uint8"), 128)
    runs: list[tuple[float, StageSeconds]] = []  # several, for a busy machine may take the processor away in any one
    with Records(tmp_path / "train.lmdb") as records:
        for _ in range(5):
            start = time.perf_counter()
            fill(out, records, SliceId(CENTER, 0, 0, 0, 128), stopwatch=watch)
            stages = watch.stop()
            whole = time.perf_counter() - start
            assert stages.read + stages.decode + stages.augment <= whole
            runs.append((whole, stages))
    whole, stages = min(runs, key=lambda run: run[0])
    assert stages.read + stages.decode + stages.augment > 0.8 * whole
    assert (stages.decode > stages.augment) == (codec == "jpeg")
    assert (stages.decode == 0) == (codec == "raw")


def test_the_stage_is_shown_while_it_lasts() -> None:
    """Whoever shares the memory sees the stage, and after the end none."""
    shown = np.zeros(1, np.int64)
    watch = Stopwatch(shown)
    seen = [int(shown[0])]
    for stage in (READ, DECODE):
        watch.enter(stage)
        seen.append(int(shown[0]))
    watch.stop()
    assert [*seen, int(shown[0])] == [NO_STAGE, READ, DECODE, NO_STAGE]


def test_it_starts_anew_after_a_stop() -> None:
    """Each slice has its own seconds, and they add up field by field."""
    watch = Stopwatch()
    watch.enter(READ)
    first = watch.stop()
    assert first.read > 0
    assert watch.stop() == StageSeconds()
    assert STAGES == ("read", "decode", "augment")
    assert StageSeconds(1, 2, 3) + StageSeconds(10, 20, 30) == StageSeconds(11, 22, 33)
    assert StageSeconds(11, 22, 33) - StageSeconds(10, 20, 30) == StageSeconds(1, 2, 3)
