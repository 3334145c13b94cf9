"""The contents of a run's folder, as far as they can be read.

A run may have been killed while it wrote, or stopped before its first checkpoint. Damaged parts are left out, and ``missing``
says which ones and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from loader_service.types import EpochAccount
from trainer.config import RunConfig
from trainer.errors import CheckpointError, ConfigError, RunFolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint
from trainer.run.folder import RunFolder
from trainer.run.progress import EpochRecord, StepRecord
from trainer.run.step_clock import TimeRecord
from trainer.run.summary import Summary


@dataclass(frozen=True)
class RateByHand:
    """A learning rate that the user set: from which step on, and its value."""

    step: int
    lr: float


@dataclass
class Log:
    """The records in a run's log, in order, without those that a crash cut off.

    Fields:
        steps, epochs, times: the records; of a step that was repeated after a crash, the last version.
        by_hand: learning rates set by ``trainer set-lr``.
        unreadable: number of lines that are no records.
    """

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    times: list[TimeRecord] = field(default_factory=list)
    by_hand: list[RateByHand] = field(default_factory=list)
    unreadable: int = 0

    @property
    def epoch_size(self) -> int | None:
        """Positions of an epoch, known once one has ended; None before."""
        ends = {record.step for record in self.epochs}
        return max((record.seen for record in self.steps if record.step in ends), default=None)

    def epoch_of(self, record: StepRecord) -> float | None:
        """Return the epochs completed after a step, with the fraction of the current one; None if their size is unknown."""
        size = self.epoch_size
        return record.epoch + record.seen / size if size else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the run by phase."""
        total: dict[str, float] = {}
        for record in self.times:
            for phase, seconds in record.seconds.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total


class About(msgspec.Struct, frozen=True):
    """The part of config.json that the report shows: the configuration, and facts about the machine."""

    config: RunConfig
    machine: dict[str, Any] = {}


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder shows it.

    Fields:
        path, name: the folder, and its name in the report.
        about: config.json; None if it cannot be read.
        log: the log.
        summary: summary.json; None if it cannot be read.
        checkpoint, checkpoint_path: newest checkpoint that can be read; None without one.
        missing: sentences that say what could not be read, and why.
    """

    path: Path
    name: str
    about: About | None
    log: Log
    summary: Summary | None
    checkpoint: Checkpoint | None
    checkpoint_path: Path | None
    missing: list[str]

    @property
    def ledger(self) -> Sequence[EpochAccount]:
        """Accounts of the samples by epoch; of the checkpoint if there is no summary."""
        if self.summary:
            return self.summary.ledger
        return self.checkpoint.plain.ledger if self.checkpoint else ()


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read runs; their names are those of their folders, numbered if two are equal.

    Raises:
        RunFolderError: no run was started in one of the folders.
    """
    names: list[str] = []
    for path in paths:
        name = path.resolve().name
        names.append(name if name not in names else f"{name}-{names.count(name) + len(names)}")
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run.

    Raises:
        RunFolderError: no run was started in the folder.
    """
    folder = RunFolder(path)
    if not folder.has_run and not folder.log.is_file():
        raise RunFolderError(path, "no run was started in it")
    missing: list[str] = []
    about = _read(folder.config, About, missing)
    summary = _read(folder.summary, Summary, missing)
    try:
        log = read_log(folder.log)
    except OSError as error:
        log = Log()
        missing.append(f"{folder.log.name} cannot be read ({error.strerror}).")
    if log.unreadable:
        missing.append(f"{log.unreadable} lines of {folder.log.name} are damaged and left out.")
    saved, saved_path = _read_checkpoint(folder, missing)
    return RunRecord(path, name, about, log, summary, saved, saved_path, missing)


def read_log(path: Path) -> Log:
    """Read a log; lines that a crash cut off are counted and left out.

    Raises:
        OSError: the file cannot be read.
    """
    log = Log()
    steps: dict[int, StepRecord] = {}
    epochs: dict[int, EpochRecord] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = msgspec.json.decode(line)
            match row["event"]:
                case "step":
                    steps[row["step"]] = msgspec.convert(row, StepRecord)
                case "epoch":
                    epochs[row["epoch"]] = msgspec.convert(row, EpochRecord)
                case "time":
                    log.times.append(msgspec.convert(row, TimeRecord))
                case "set-lr":
                    log.by_hand.append(RateByHand(int(row["step"]), float(row["lr"])))
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            log.unreadable += 1
    log.steps = [steps[step] for step in sorted(steps)]
    log.epochs = [epochs[epoch] for epoch in sorted(epochs)]
    return log


def _read(path: Path, kind: Any, missing: list[str]) -> Any:
    """Return the content of a JSON file as ``kind``; None, with a sentence in ``missing``, if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        missing.append(f"There is no {path.name}.")
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({error.strerror}).")
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        missing.append(f"{path.name} is damaged ({error}).")
    return None


def _read_checkpoint(folder: RunFolder, missing: list[str]) -> tuple[Checkpoint | None, Path | None]:
    """Return the newest checkpoint that can be read."""
    paths = checkpoint.saved(folder.checkpoints)
    if not paths:
        missing.append("There is no checkpoint, so nothing that needs the network can be shown.")
    for path in reversed(paths):
        try:
            return checkpoint.load(path), path
        except CheckpointError as error:
            missing.append(f"{path.name}: {error.reason}.")
    return None, None
