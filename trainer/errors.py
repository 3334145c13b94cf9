"""Every error that the trainer raises on purpose, in one tree.

::

    TrainerError                  exit code 1; never raised itself
    ├── ConfigError               2  an option that cannot work, or that contradicts the run it resumes
    ├── RunFolderError            3  a run folder that is missing, taken or damaged
    ├── CheckpointError           3  a checkpoint that cannot be read or does not fit
    ├── DeviceError               5  a device that this machine lacks, or that is too small
    ├── TrainingDiverged          8  the loss is no longer a number, or has exploded
    └── PeerLost                  9  another process of the run is gone

An error keeps its facts as fields and builds its sentence from them: what was wrong, where, and what to do.
The command line prints the sentence and ends with the exit code, without a traceback.
"""

from __future__ import annotations

import math
from pathlib import Path


class TrainerError(Exception):
    """Base of every deliberate error; ``str(error)`` is a whole sentence for a person."""

    exit_code = 1


class ConfigError(TrainerError):
    """An option that cannot work, or that contradicts the run it resumes."""

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


class DeviceError(TrainerError):
    """A device that this machine lacks, or that is too small."""

    exit_code = 5

    def __init__(self, device: str, reason: str) -> None:
        self.device, self.reason = device, reason
        super().__init__(f"the device {device} cannot be used: {reason}.")


class TrainingDiverged(TrainerError):
    """The loss is no longer a number, or far above guessing's: going on would only spoil the weights further."""

    exit_code = 8

    def __init__(self, step: int, loss: float, layer: str | None, checkpoint: Path | None) -> None:
        self.step, self.loss, self.layer, self.checkpoint = step, loss, layer, checkpoint
        what = f"exploded to {loss:.3g}" if math.isfinite(loss) else "stopped being a number"
        where = f", {layer} being the first layer to look at" if layer else ""
        back = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"the loss {what} at step {step}{where}: {back}; try a smaller --lr.")


class PeerLost(TrainerError):
    """Another process of the run is gone, and nothing can be computed without it."""

    exit_code = 9

    def __init__(self, doing: str, reason: str) -> None:
        self.doing, self.reason = doing, reason
        said = (
            reason.splitlines()[0].rpartition("] ")[2] if "] " in reason else reason
        )  # less a place in another's source
        super().__init__(
            f"another process of this run is gone, found while {doing} ({said.partition('. ')[0]}): "
            "start all of them again with --resume auto, or let torchrun do it with --max-restarts."
        )
