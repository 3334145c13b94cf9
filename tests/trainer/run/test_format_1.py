"""Checkpoints of format 1: the rate of their last step, and the velocities that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.model.presets import PRESETS
from trainer.run.checkpoint import Plain
from trainer.run.format_1 import rate_of_last_step, velocities
from trainer.run.progress import EpochRecord, Progress
from trainer.schedule import Schedule

CONFIG = RunConfig(epochs=3, batch_size=50)
COUNT = 300
COSINE, WARM_UP = Schedule(0.01, "cosine"), Schedule(0.01, warmup=2.0)
DROPPED = Schedule(0.001, best=0.5, drops=1)  # by a plateau, at the end of the first epoch


def plain(schedule: Schedule, epoch: int, seen: int) -> Plain:
    """Return the plain part of a file of step 6 or later; the epoch before it ended with the rate .01."""
    progress = Progress(step=6, epoch=epoch, seen=seen)
    history = [EpochRecord(0, 6, 1.0, 0.5, 1.0, 0.5, 0.0, 0.01)] if epoch else []
    return Plain(CONFIG, progress, schedule, {}, [], history, ("ant", "bee"), "abc", COUNT)


def path_with_log(folder: Path, *events: dict[str, Any]) -> Path:
    earlier = {"event": "step", "step": 5, "lr": 0.9}
    (folder / "log.jsonl").write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in (earlier, *events)))
    return folder / "checkpoints" / "step-000000006.pt"


def by_hand(rate: float) -> dict[str, Any]:
    return {"event": "set-lr", "step": 6, "lr": rate}


RESUMED, STOPPED, STEP = (
    {"event": "resume", "step": 6},
    {"event": "stop", "step": 6},
    {"event": "step", "step": 6, "lr": 0.0077},
)


@pytest.mark.parametrize(
    ("content", "events", "rate"),
    [
        (plain(Schedule(0.01), 0, 200), [], 0.01),
        (plain(DROPPED, 1, 0), [], 0.01),
        (plain(DROPPED, 1, 50), [], 0.001),
        (plain(Schedule(0.01, "step", drop_at=(1,)), 1, 0), [], 0.01),
        (plain(Schedule(0.01, "step", drop_at=(1,)), 1, 50), [], 0.001),
        (plain(COSINE, 0, 200), [], COSINE.rate(0.5, 3)),
        (plain(COSINE, 0, 200), [RESUMED], COSINE.rate(0.5, 3)),
        (plain(COSINE, 0, 200), [STEP, RESUMED, STOPPED], 0.0077),
        (plain(WARM_UP, 0, 200), [], WARM_UP.rate(0.5, 3)),
        (plain(WARM_UP, 1, 0), [], 0.01),
        (plain(Schedule(0.002), 1, 0), [by_hand(0.002)], 0.002),
        (plain(Schedule(0.002), 1, 50), [], 0.002),
        (plain(COSINE.by_hand(0.002, 2 / 3, 3), 0, 200), [STEP, by_hand(0.002)], 0.002),
        (plain(COSINE, 0, 200), [STEP, by_hand(0.002)], 0.0077),
    ],
    ids=[
        "constant",
        "at a plateau's drop",
        "after a plateau's drop",
        "at a step's drop",
        "after a step's drop",
        "cosine",
        "cosine, resumed and killed",
        "cosine, its step in the log",
        "warm-up",
        "warm-up, an epoch's end",
        "by hand, an epoch's end",
        "a step after by hand",
        "cosine by hand",
        "by hand, killed before the save",
    ],
)
def test_the_rate_of_the_last_step(tmp_path: Path, content: Plain, events: list[dict[str, Any]], rate: float) -> None:
    """Progress, history and log together tell the rate that the buffers are for."""
    assert rate_of_last_step(content, path_with_log(tmp_path, *events)) == rate


def test_a_constant_rate_needs_no_log(tmp_path: Path) -> None:
    """Without a log, a file whose rate cannot have changed is read."""
    path = tmp_path / "checkpoints" / "step-000000006.pt"
    assert rate_of_last_step(plain(Schedule(0.01), 0, 200), path) == 0.01
    assert rate_of_last_step(plain(Schedule(0.01), 1, 0), path) == 0.01


@pytest.mark.parametrize("content", [plain(DROPPED, 1, 0), plain(COSINE, 0, 200)], ids=["plateau", "cosine"])
def test_an_unknown_rate_is_refused(tmp_path: Path, content: Plain) -> None:
    """Without the log, a file at a change of the rate is refused by name, with what to do."""
    with pytest.raises(CheckpointError, match=r"step-000000006\.pt .*log\.jsonl, which tells it, is missing: put it"):
        rate_of_last_step(content, tmp_path / "checkpoints" / "step-000000006.pt")


def test_a_file_that_was_written_anew_is_refused(tmp_path: Path) -> None:
    """A run that was resumed, perhaps with another batch size, and stopped before a step does not tell its rate."""
    with pytest.raises(CheckpointError, match="stopped again without a step: use an earlier one"):
        rate_of_last_step(plain(COSINE, 0, 200), path_with_log(tmp_path, RESUMED, STOPPED))


@pytest.mark.parametrize(("preset", "factor"), [("paper", 1.0), ("original", 2.0)])
def test_velocities(tmp_path: Path, preset: str, factor: float) -> None:
    """v is -rate times the buffer; biases have the preset's rate."""
    buffers = {"fc8.weight": torch.ones(2), "fc8.bias": torch.ones(3)}
    found = velocities(buffers, plain(DROPPED, 1, 0), path_with_log(tmp_path), PRESETS[preset])
    assert torch.equal(found["fc8.weight"], torch.full((2,), -0.01))
    assert torch.equal(found["fc8.bias"], torch.full((3,), -0.01 * factor))


def test_a_run_without_a_step_has_none(tmp_path: Path) -> None:
    """A file without buffers gives no velocities, whatever its rate."""
    assert velocities({}, plain(DROPPED, 1, 0), tmp_path / "x" / "y.pt", PRESETS["paper"]) == {}
