"""A run's folder: what a run leaves behind, and where.

::

    RUN/
      config.json            configuration, versions, machine and commit, as of the last start
      log.jsonl              one JSON object per line: start, resume, step, layers, epoch, set-lr, not-saved, stop, end
      summary.json           the results so far, rewritten after each epoch
      tensorboard/           the same curves, for TensorBoard
      checkpoints/           see ``trainer.run.checkpoint``
      set-lr.json            a learning rate set by hand that no step has used yet
      kernels.png            first-layer kernels, tower by tower
      curves.svg             loss and error over time
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import torch

from trainer.config import RunConfig
from trainer.errors import ConfigError, RunFolderError
from trainer.run import checkpoint

_GIT_TIMEOUT_S: Final = 5


class RequestedRate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A learning rate that somebody has set by hand."""

    lr: Annotated[float, msgspec.Meta(gt=0, lt=1)]


class _About(msgspec.Struct, frozen=True):
    """What is asked of config.json again."""

    launch: str | None = None


class RunFolder:
    """Paths within a run's folder, and the writing of its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.log = path / "log.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.rate = path / "set-lr.json"
        self.kernels = path / "kernels.png"
        self.curves = path / "curves.svg"

    @classmethod
    def create(cls, path: Path | None, parent: Path) -> RunFolder:
        """Make a new folder: ``path``, which must not exist or be empty, or a new one named by the time under ``parent``.

        Raises:
            RunFolderError: there is something at ``path`` already, or it cannot be made.
        """
        try:
            return cls(_make(path) if path is not None else _make_named(parent))
        except OSError as error:
            raise RunFolderError(path or parent, f"it cannot be made ({error.strerror})") from error

    @property
    def has_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config.is_file()

    def describe(self, config: RunConfig, launch: str | None = None) -> None:
        """Write down how the run is made from now on: its configuration, and the code that runs it.

        Args:
            config: of the run.
            launch: by which torchrun, if any; see ``is_of``.
        """
        about = {
            "config": msgspec.to_builtins(config),
            "versions": _versions(),
            "machine": _machine(),
            "python": platform.python_version(),
            "commit": _commit(),
            "launch": launch,
        }
        _write_json(self.config, about)

    def is_of(self, launch: str | None) -> bool:
        """Whether it was ``launch`` that worked on this run last: then starting again is going on."""
        try:
            about = msgspec.json.decode(self.config.read_bytes(), type=_About)
        except (FileNotFoundError, msgspec.MsgspecError):
            return False
        return launch is not None and about.launch == launch

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, None before the first."""
        saved = checkpoint.saved(self.checkpoints)
        return saved[-1] if saved else None

    def request_rate(self, rate: float) -> None:
        """Ask the run to use another learning rate from its next step on, now or when it goes on.

        Raises:
            RunFolderError: no run was started here.
            ConfigError: no learning rate.
        """
        if not self.has_run:
            raise RunFolderError(self.path, "no run was started there")
        if not 0 < rate < 1:
            raise ConfigError("RATE", rate, "a number between 0 and 1")
        _write_json(self.rate, RequestedRate(rate))

    def requested_rate(self) -> float | None:
        """What ``request_rate`` was asked for and nobody has forgotten yet.

        Raises:
            RunFolderError: something else lies in its place.
        """
        try:
            content = self.rate.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=RequestedRate).lr
        except msgspec.MsgspecError as error:
            raise RunFolderError(self.path, f"{self.rate.name} is not what trainer set-lr writes ({error})") from error

    def clear_requested_rate(self, rate: float) -> None:
        """The request for ``rate`` has been obeyed; a newer one stays."""
        if self.requested_rate() == rate:
            self.rate.unlink(missing_ok=True)

    def append(self, record: msgspec.Struct | dict[str, Any]) -> None:
        """Add a line to the log."""
        with self.log.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")

    def write_summary(self, summary: msgspec.Struct) -> None:
        """Replace the summary."""
        _write_json(self.summary, summary)


def newest_run(parent: Path) -> Path | None:
    """The youngest run under ``parent`` that has a checkpoint, None if there is none."""
    runs = [run for run in parent.glob("*/config.json") if RunFolder(run.parent).newest_checkpoint()]
    return max(runs, key=lambda config: config.stat().st_mtime).parent if runs else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by ``path``: the file itself, or the newest of a run's folder.

    Raises:
        RunFolderError: a folder without one.
    """
    if not path.is_dir():
        return path
    newest = RunFolder(path).newest_checkpoint()
    if newest is None:
        raise RunFolderError(path, "it has no checkpoint yet")
    return newest


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: a reader sees the old file or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _make(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise RunFolderError(path, "it is not empty; name another, or go on with that run by --resume auto")
    return path


def _make_named(parent: Path) -> Path:
    """A new folder named by the time; two runs started within a second get names of their own."""
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    for name in itertools.chain([stamp], (f"{stamp}-{n}" for n in itertools.count(2))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise AssertionError("itertools.count has no end")


def _versions() -> dict[str, str]:
    """Every library that is installed beside this code, and what torch was built with."""
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    built = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return dict(sorted(found.items())) | {name: str(version) for name, version in built.items() if version}


def _machine() -> dict[str, Any]:
    """Where the run takes place."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}


def _commit() -> str | None:
    """The commit that this code is at, None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
