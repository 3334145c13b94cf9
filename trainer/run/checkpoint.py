"""Checkpoints: all that a run needs to continue as if it had never stopped.

A file holds tensors and plain values. It is loaded with ``weights_only=True``, so no code in it runs, and checked against
the types below. It is written under a temporary name, flushed to disk and renamed, so that the last good checkpoint
survives a crash at any moment. The newest KEPT files stay, and ``best.pt``, that of the lowest validation error.

Format 2 holds the velocities v of the paper's update rule. Format 1 holds -v / rate, with the rate of the last step, which
``trainer.run.format_1`` looks up.

Training does not wait for the disk: ``Saver`` writes in a thread. Its rules:

1. ``save`` copies the state before it returns. It waits only if the previous checkpoint is still being written, so there
   is never more than one copy of the network.
2. A failed write does not stop the training: earlier checkpoints stay, ``failure`` reports the error, and the next
   checkpoint is tried as usual. Only the last one of a run must succeed: ``finish`` raises.
3. Leaving the context waits for the current write.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from loader_service.types import EpochAccount
from trainer.config import RunConfig
from trainer.data.normalisation import Facts
from trainer.errors import CheckpointError, TrainerError
from trainer.run.progress import EpochRecord, Progress
from trainer.schedule import Schedule

FORMAT: Final = 2
READABLE: Final = (1, FORMAT)
KEPT: Final = 2  # two, so that a checkpoint damaged on the disk has a predecessor
BEST: Final = "best.pt"
_PATTERN: Final = "step-*.pt"


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    """The part of a checkpoint without tensors.

    Fields:
        config: configuration of the run.
        progress: counters of the run.
        schedule: learning rate schedule.
        loader: position of the loader.
        ledger: accounts of the epochs that have begun.
        history: results of the epochs that have ended.
        class_names, fingerprint, count: facts about the training split.
        crop: side of the network's input, in pixels; 224 in files without it.
    """

    config: RunConfig
    progress: Progress
    schedule: Schedule
    loader: dict[str, Any]
    ledger: list[EpochAccount]
    history: list[EpochRecord]
    class_names: tuple[str, ...]
    fingerprint: str
    count: int
    crop: int = 224


@dataclass(frozen=True)
class Checkpoint:
    """A snapshot of a run.

    Fields:
        plain: all that is not a tensor.
        model: parameters by name, on any device.
        momentum: velocities v by parameter name; -v / rate in format 1.
        mean: (side, side, 3) float32, mean image of the training split.
        random: states of torch's generators by device. The trainer does not draw from them; a user's layers may.
        ema: moving average of the weights by parameter name; empty without --ema.
        format: format of the file that it was read from.
    """

    plain: Plain
    model: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    mean: Tensor
    random: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def facts(self) -> Facts:
        """Facts about the training split."""
        plain = self.plain
        return Facts(plain.count, plain.class_names, plain.fingerprint, self.mean, plain.crop)


def save(folder: Path, checkpoint: Checkpoint, is_best: bool) -> Path:
    """Write a checkpoint to ``folder``, in the newest format, and remove the oldest beyond KEPT.

    Returns:
        Its path; the file is complete and on disk.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints stay.
    """
    path = path_of(folder, checkpoint.plain.progress.step)
    content = {
        "format": FORMAT,
        "plain": msgspec.to_builtins(checkpoint.plain, builtin_types=(bytes,)),  # weights_only allows nothing else
        "tensors": {
            "model": _on_host(checkpoint.model),
            "momentum": _on_host(checkpoint.momentum),
            "random": _on_host(checkpoint.random),
            "ema": _on_host(checkpoint.ema),
            "dataset": {"mean": checkpoint.mean},
        },
    }
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave the name without its content
        part.replace(path)
        if is_best:
            _link(path, folder / BEST)
        _flush_folder(folder)  # the new file is safe before an old one goes
        for old in [*saved(folder)[:-KEPT], *folder.glob("*.part")]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):  # the disk may be full; the first error is the one to report
            part.unlink()
        raise CheckpointError(path, f"it cannot be written ({_first_line(error)})") from error
    return path


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after ``step`` updates."""
    return folder / f"step-{step:09d}.pt"


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first, without ``best.pt``."""
    return sorted(folder.glob(_PATTERN))


def load(path: Path) -> Checkpoint:
    """Load and check a checkpoint, with its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or of another program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file") from None
    except Exception as error:  # damaged files raise a dozen undocumented kinds
        raise CheckpointError(
            path,
            f"it is damaged or no checkpoint ({_first_line(error)}); name another, or remove it to use the one before",
        ) from error
    if not isinstance(content, dict) or content.get("format") not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise CheckpointError(path, f"it is not in this trainer's format {known}; use the version that wrote it")
    try:
        plain = msgspec.convert(content.get("plain"), Plain)
        tensors = msgspec.convert(content.get("tensors"), dict[str, dict[str, Tensor]])
        return Checkpoint(
            plain=plain,
            model=tensors["model"],
            momentum=tensors["momentum"],
            mean=tensors["dataset"]["mean"],
            random=tensors["random"],
            ema=tensors.get("ema", {}),
            format=content["format"],
        )
    except (msgspec.ValidationError, KeyError) as error:
        raise CheckpointError(path, f"its content is invalid ({_first_line(error)})") from error


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's generators, of the CPU and of each GPU in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Restore the result of ``random_states``, for devices that this machine has."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


class Saver:
    """A writer of checkpoints, one at a time, each in a thread; use it as a context manager.

    Args:
        folder: folder of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def save(self, whole: Checkpoint, is_best: bool, written: Callable[[], object]) -> None:
        """Start to write a checkpoint of the current state; the thread calls ``written`` once it is on disk."""
        self.wait()  # rule 1
        self._writing = threading.Thread(
            target=self._write, args=(_snapshot(whole), is_best, written), name="checkpoint"
        )
        self._writing.start()

    def wait(self) -> None:
        """Wait for the current write."""
        if self._writing is not None:
            self._writing.join()

    def failure(self) -> CheckpointError | None:
        """Return the error of the newest write, once; None if it succeeded or is still running."""
        if self._writing is not None and self._writing.is_alive():
            return None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, CheckpointError):  # such as a damaged set-lr.json
            raise error
        return error

    def finish(self) -> None:
        """Wait until the newest checkpoint is on disk.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.wait()
        error = self.failure()
        if error is not None:
            raise error

    def _write(self, whole: Checkpoint, is_best: bool, written: Callable[[], object]) -> None:
        try:
            save(self._folder, whole, is_best)
            self._error = None
            written()
        except (TrainerError, OSError) as error:  # ``failure`` reports it to the training thread
            self._error = error


def _snapshot(whole: Checkpoint) -> Checkpoint:
    """Return a copy in host memory that training does not change."""
    plain = msgspec.structs.replace(
        whole.plain,
        progress=msgspec.structs.replace(whole.plain.progress),
        history=list(whole.plain.history),
    )
    return replace(
        whole,
        plain=plain,
        model=_copied_to_host(whole.model),
        momentum=_copied_to_host(whole.momentum),
        ema=_copied_to_host(whole.ema),
    )


def _copied_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _link(path: Path, name: Path) -> None:
    """Give ``path`` a second name, atomically, and replace the file of that name."""
    part = name.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        part.hardlink_to(path)  # needs no space
    except OSError:  # some network file systems have no hard links
        shutil.copyfile(path, part)
    part.replace(name)


def _flush_folder(folder: Path) -> None:
    """Flush the folder itself, so that renames survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
