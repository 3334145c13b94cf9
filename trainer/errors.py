"""Every error that the trainer raises on purpose, in one tree.

::

    TrainerError                  exit code 1; never raised itself
    ├── ConfigError               2  an option that cannot work, or that contradicts the run it resumes
    ├── RunFolderError            3  a run folder that is missing, taken or damaged
    ├── CheckpointError           3  a checkpoint that cannot be read or does not fit
    ├── DeviceError               5  a device that this machine lacks, or that is too small
    └── TrainingDiverged          8  the loss is no longer a number

An error keeps its facts as fields and builds its sentence from them: what was wrong, where, and what to do.
The command line prints the sentence and ends with the exit code, without a traceback.
"""

from __future__ import annotations

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
    """The loss is no longer a number, so that going on would only spoil the weights further."""

    exit_code = 8

    def __init__(self, step: int, layer: str | None, checkpoint: Path | None) -> None:
        self.step, self.layer, self.checkpoint = step, layer, checkpoint
        where = f", first in {layer}" if layer else ""
        back = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"the loss stopped being a number at step {step}{where}: {back}; try a smaller --lr.")
