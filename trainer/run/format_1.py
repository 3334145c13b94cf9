"""Velocities in checkpoints of format 1, the only one of version 0.1.

Such a file holds -v / rate, with the rate of the last step before it was written. The file itself tells that rate only in
part: a plateau or ``trainer set-lr`` may have changed the schedule between the step and the save. The run's log tells the
rest. Biases have a rate of their own in the preset ``original``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.model.presets import Preset
from trainer.optimizer import is_bias
from trainer.run.checkpoint import Plain

_EVENTS_READ = (b'"event":"step"', b'"event":"set-lr"', b'"event":"resume"', b'"event":"stop"')


def velocities(buffers: Mapping[str, Tensor], plain: Plain, path: Path, preset: Preset) -> dict[str, Tensor]:
    """Return the velocities v by parameter name.

    Args:
        buffers: momentum buffers of the file, -v / rate, by parameter name.
        plain: the other content of the file.
        path: the file, in RUN/checkpoints; RUN/log.jsonl is read.
        preset: rate of the biases.

    Raises:
        CheckpointError: the rate of the last step is unknown.
    """
    if not buffers:  # stopped before the first step
        return {}
    rate = rate_of_last_step(plain, path)
    factors = [-rate * (preset.bias_rate if is_bias(name) else 1.0) for name in buffers]
    return dict(zip(buffers, torch._foreach_mul(list(buffers.values()), factors), strict=True))


def rate_of_last_step(plain: Plain, path: Path) -> float:
    """Return the learning rate that the momentum buffers of a file of format 1 are for.

    Raises:
        CheckpointError: it is unknown.
    """
    progress, schedule, epochs = plain.progress, plain.schedule, plain.config.epochs
    epochs_done = progress.epoch + progress.seen / plain.count
    next_rate = schedule.rate(epochs_done, epochs)
    if not progress.seen and schedule.policy == "plateau":
        rate = plain.history[-1].lr  # before the drop, if there was one
    else:
        # The other policies depend on the position alone. Only an epoch's last batch may be short.
        epoch, seen = (progress.epoch, progress.seen) if progress.seen else (progress.epoch - 1, plain.count)
        batch = plain.config.batch_size
        images = batch if seen < plain.count else plain.count % batch or batch
        rate = schedule.rate(epoch + max(0, seen - images) / plain.count, epochs)
    log = _events_at(progress.step, path.parent.parent / "log.jsonl")
    if log is None:
        if rate != next_rate:
            raise CheckpointError(path, _unknown("RUN/log.jsonl, which tells it, is missing: put it back"))
        return rate

    # ``set-lr`` rescales the buffers to the new rate and saves at once, but a crash may have come before that save.
    for event in log:
        if event["event"] == "set-lr" and schedule == schedule.by_hand(event["lr"], epochs_done, epochs):
            return float(event["lr"])
    steps = [float(event["lr"]) for event in log if event["event"] == "step"]
    if steps:
        return steps[-1]
    # A run that is resumed and stopped before its next step writes the file anew, with the options of that resume.
    kinds = [event["event"] for event in log]
    rewritten = "resume" in kinds and "stop" in kinds[kinds.index("resume") :]
    if progress.seen and rate != next_rate and rewritten:
        raise CheckpointError(
            path, _unknown("the run was resumed and stopped again without a step: use an earlier one")
        )
    return rate


def _unknown(reason: str) -> str:
    return f"it was written by version 0.1 and does not tell the learning rate of its last step; {reason}"


def _events_at(step: int, log: Path) -> list[dict[str, Any]] | None:
    """Return the log's events after update ``step`` and before the next, in order; None without a log."""
    try:
        lines = log.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    events: list[dict[str, Any]] = []
    for line in lines:
        if not any(kind in line for kind in _EVENTS_READ):
            continue
        try:
            event = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError:
            continue  # a crash of the machine may have cut a line off
        if event.get("step") == step:
            events.append(event)
    return events
