"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A file holds tensors and plain values, is read with ``weights_only=True`` and checked against the types below before
anything of it is believed. It is written under another name, flushed to the disk and then renamed: at any moment, and
whatever dies, the last good checkpoint is there. The newest KEPT stay, and ``best.pt``, the one of the lowest
validation error.

A training does not wait for the disk: a thread writes what it hands over. Rules of ``Saver``:

1. ``save`` copies all that training changes before it returns. It waits only for the checkpoint before, if that is still
   being written: there is never more than one copy of the network.
2. A checkpoint that cannot be written is no reason to end a training that goes well: those before stay, ``failure`` tells
   it, and the next one is tried as usual. Only the last one of a run must be written: ``finish`` raises.
3. Who leaves the context has waited for the write under way.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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

FORMAT: Final = 1
KEPT: Final = 2
BEST: Final = "best.pt"
_PATTERN: Final = "step-*.pt"


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    """The part of a checkpoint without tensors.

    Fields:
        config: of the run.
        progress: how far it has come.
        schedule: of the learning rate.
        loader: the loader's position.
        ledger: of each epoch begun.
        history: of each epoch ended.
        class_names, fingerprint, count: of the training split.
        crop: side of what the network sees of a record, in pixels.
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
    """A run at one moment.

    Fields:
        plain: everything but tensors.
        model: parameters by name, on any device.
        momentum: the optimiser's, by the name of the parameter.
        mean: (side, side, 3) float32, the training split's mean image.
        random: states of torch's generators, by device. The trainer draws nothing from them; layers of others may.
    """

    plain: Plain
    model: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    mean: Tensor
    random: Mapping[str, Tensor]

    @property
    def facts(self) -> Facts:
        """The training split that the run was made with."""
        plain = self.plain
        return Facts(plain.count, plain.class_names, plain.fingerprint, self.mean, plain.crop)


def save(folder: Path, checkpoint: Checkpoint, is_best: bool) -> Path:
    """Write a checkpoint into ``folder`` and remove the oldest beyond KEPT.

    Returns:
        Its path. It is whole and on the disk when this returns.

    Raises:
        CheckpointError: it cannot be written; the ones before are untouched.
    """
    path = path_of(folder, checkpoint.plain.progress.step)
    content = {
        "format": FORMAT,
        "plain": msgspec.to_builtins(checkpoint.plain, builtin_types=(bytes,)),
        "tensors": {
            "model": _on_host(checkpoint.model),
            "momentum": _on_host(checkpoint.momentum),
            "random": _on_host(checkpoint.random),
            "dataset": {"mean": checkpoint.mean},
        },
    }
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if is_best:
            _link(path, folder / BEST)
        _flush_folder(folder)
        for old in [*saved(folder)[:-KEPT], *folder.glob("*.part")]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(path, f"it cannot be written ({_first_line(error)})") from error
    return path


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` updates lies."""
    return folder / f"step-{step:09d}.pt"


def saved(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, without ``best.pt``."""
    return sorted(folder.glob(_PATTERN))


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint; its tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not of this trainer.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file") from None
    except Exception as error:  # torch.load names no errors, and damaged files raise a dozen kinds
        raise CheckpointError(path, f"it is damaged or no checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(path, f"it is not of this trainer's format {FORMAT}")
    try:
        plain = msgspec.convert(content.get("plain"), Plain)
        tensors = msgspec.convert(content.get("tensors"), dict[str, dict[str, Tensor]])
        return Checkpoint(plain, tensors["model"], tensors["momentum"], tensors["dataset"]["mean"], tensors["random"])
    except (msgspec.ValidationError, KeyError) as error:
        raise CheckpointError(path, f"its content is not as it must be ({_first_line(error)})") from error


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators: of the CPU and of each GPU in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Take over what ``random_states`` gave, of the devices that are here."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


class Saver:
    """Writes the checkpoints of a run, one after the other, each in a thread; a context manager.

    Args:
        folder: where they go.
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
        """Begin to write a checkpoint of this moment; ``written`` is called, in the thread, once it is on the disk."""
        self.wait()
        self._writing = threading.Thread(
            target=self._write, args=(_snapshot(whole), is_best, written), name="checkpoint"
        )
        self._writing.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing.join()

    def failure(self) -> CheckpointError | None:
        """Why the newest write came to nothing; told once. None if it did not, or is under way."""
        if self._writing is not None and self._writing.is_alive():
            return None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        return error

    def finish(self) -> None:
        """Wait until the newest checkpoint is on the disk.

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
        except (TrainerError, OSError) as error:  # for the thread that trains to hear of
            self._error = error


def _snapshot(whole: Checkpoint) -> Checkpoint:
    """The same moment, in memory of the host that training does not touch."""
    plain = msgspec.structs.replace(
        whole.plain,
        progress=msgspec.structs.replace(whole.plain.progress),
        history=list(whole.plain.history),
    )
    return replace(whole, plain=plain, model=_copied_to_host(whole.model), momentum=_copied_to_host(whole.momentum))


def _copied_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _link(path: Path, name: Path) -> None:
    """Give ``path`` a second name, replacing what had it, in one step."""
    part = name.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        part.hardlink_to(path)  # no second copy on the disk
    except OSError:  # some network file systems have no links
        shutil.copyfile(path, part)
    part.replace(name)


def _flush_folder(folder: Path) -> None:
    """Make renames in ``folder`` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
