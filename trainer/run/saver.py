"""Checkpoints without waiting for the disk: a thread writes what the training has handed over.

Rules of the file:

1. ``save`` copies all that training changes before it returns. It waits only for the checkpoint before, if that is still
   being written: there is never more than one copy of the network.
2. A checkpoint that cannot be written is no reason to end a training that goes well: those before stay, ``failure`` tells
   it, and the next one is tried as usual. Only the last one of a run must be written: ``finish`` raises.
3. Who leaves the context has waited for the write under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import msgspec
from torch import Tensor

from trainer.errors import CheckpointError, TrainerError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint


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
        self._writing = threading.Thread(target=self._write, args=(_copy(whole), is_best, written), name="checkpoint")
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
            checkpoint.save(self._folder, whole, is_best)
            self._error = None
            written()
        except (TrainerError, OSError) as error:  # for the thread that trains to hear of
            self._error = error


def _copy(whole: Checkpoint) -> Checkpoint:
    """The same moment, in memory of the host that training does not touch."""
    plain = msgspec.structs.replace(
        whole.plain,
        progress=msgspec.structs.replace(whole.plain.progress),
        history=list(whole.plain.history),
    )
    return replace(whole, plain=plain, model=_to_host(whole.model), momentum=_to_host(whole.momentum))


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
