"""All errors that the trainer raises on purpose, in one tree.

::

    TrainerError                  exit code 1; never raised itself
    ├── ConfigError               2  an option with an impossible value, or one that contradicts the resumed run
    ├── RunFolderError            3  a run folder that is missing, taken or damaged
    ├── CheckpointError           3  a checkpoint that cannot be read or does not fit
    ├── ReportError               3  a report that cannot be drawn or written
    ├── DeviceError               5  a device that is missing, or whose memory is too small
    ├── TrainingDiverged          8  the loss is NaN or infinite, or has exploded
    └── PeerLost                  9  another process of the run has died

An error keeps its facts as fields and builds one sentence from them: the cause, the place and the remedy. The command
line prints that sentence and exits with the class's exit code, without a traceback.
"""

from __future__ import annotations

import math
from pathlib import Path


class TrainerError(Exception):
    """Base class of all deliberate errors; ``str(error)`` is a complete sentence for the user."""

    exit_code = 1


class ConfigError(TrainerError):
    """An option with an impossible value, or one that contradicts the resumed run."""

    exit_code = 2

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option, self.value, self.expected = option, value, expected
        super().__init__(f"{option}={value} cannot work: expected {expected}.")


class RunFolderError(TrainerError):
    """A run folder that is missing, taken or damaged."""

    exit_code = 3

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"the run folder {path} cannot be used: {reason}.")


class CheckpointError(TrainerError):
    """A checkpoint that cannot be read or does not fit."""

    exit_code = 3

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"the checkpoint {path} cannot be used: {reason}.")


class ReportError(TrainerError):
    """A report that cannot be drawn or written."""

    exit_code = 3

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the report cannot be made: {reason}.")


class DeviceError(TrainerError):
    """A device that this machine lacks, or whose memory is too small."""

    exit_code = 5

    def __init__(self, device: str, reason: str) -> None:
        self.device, self.reason = device, reason
        super().__init__(f"the device {device} cannot be used: {reason}.")


class TrainingDiverged(TrainerError):
    """A loss that is NaN, infinite, or far above that of guessing; further steps would only damage the weights."""

    exit_code = 8

    def __init__(self, step: int, loss: float, layer: str | None, checkpoint: Path | None) -> None:
        self.step, self.loss, self.layer, self.checkpoint = step, loss, layer, checkpoint
        problem = f"exploded to {loss:.3g}" if math.isfinite(loss) else "became NaN or infinite"
        where = f" (inspect {layer} first)" if layer else ""
        back = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"the loss {problem} at step {step}{where}: {back}; try a smaller --lr.")


class PeerLost(TrainerError):
    """Another process of the run has died; this one cannot compute without it."""

    exit_code = 9

    def __init__(self, doing: str, reason: str) -> None:
        self.doing, self.reason = doing, reason
        # torch puts "[file.cpp:line] " before its message; users need only the message's first sentence.
        message = reason.splitlines()[0].rpartition("] ")[2] if "] " in reason else reason
        super().__init__(
            f"another process of this run is gone, found while {doing} ({message.partition('. ')[0]}): "
            "start all of them again with --resume auto, or let torchrun do it with --max-restarts."
        )
