"""The folder of a run and its files.

::

    RUN/
      config.json            configuration, versions, machine and commit, of the last start
      log.jsonl              one JSON object per line: start, resume, step, layers, time, epoch, set-lr, not-saved,
                             not-started, stop, end
      summary.json           results so far, rewritten after each epoch
      tensorboard/           event files for TensorBoard
      checkpoints/           see ``trainer.run.checkpoint``
      set-lr.json            requested learning rate that no checkpoint includes yet
      kernels.png            first-layer kernels, tower by tower
      report/                page and figures, by trainer report
      trace.json             profile of a few steps, with --profile
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
    """A learning rate requested by ``trainer set-lr``."""

    lr: Annotated[float, msgspec.Meta(gt=0, lt=1)]


class _About(msgspec.Struct, frozen=True):
    """The part of config.json that the trainer reads back."""

    launch: str | None = None


class RunFolder:
    """The paths in a run's folder, and its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.log = path / "log.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.rate = path / "set-lr.json"
        self.kernels = path / "kernels.png"
        self.trace = path / "trace.json"

    @classmethod
    def create(cls, path: Path | None, parent: Path) -> RunFolder:
        """Create a folder: ``path``, which must be missing or empty, or if None a folder under ``parent`` named by the time.

        Raises:
            RunFolderError: ``path`` is in use, or the folder cannot be created.
        """
        try:
            return cls(_make(path) if path is not None else _make_named(parent))
        except OSError as error:
            raise RunFolderError(path or parent, f"it cannot be created ({error.strerror})") from error

    @property
    def has_run(self) -> bool:
        """True if a run was started in this folder."""
        return self.config.is_file()

    def describe(self, config: RunConfig, launch: str | None = None) -> None:
        """Write config.json: the configuration, and the code and machine that run it.

        Args:
            config: configuration of the run.
            launch: id of the torchrun launch, if any; see ``is_of``.
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
        """Return True if the torchrun launch ``launch`` started this run last, so that its restart may continue it."""
        try:
            about = msgspec.json.decode(self.config.read_bytes(), type=_About)
        except (FileNotFoundError, msgspec.MsgspecError):
            return False  # no run, or no file of ours
        return launch is not None and about.launch == launch

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint, None before the first."""
        saved = checkpoint.saved(self.checkpoints)
        return saved[-1] if saved else None

    def request_rate(self, rate: float) -> None:
        """Request another learning rate: after the run's next log line, or from its first step after a resume.

        Raises:
            RunFolderError: no run was started in this folder.
            ConfigError: ``rate`` is not between 0 and 1.
        """
        if not self.has_run:
            raise RunFolderError(self.path, "no run was started in it")
        if not 0 < rate < 1:
            raise ConfigError("RATE", rate, "a number between 0 and 1")
        _write_json(self.rate, RequestedRate(rate))

    def requested_rate(self) -> float | None:
        """Return the pending request of ``request_rate``, None if there is none.

        Raises:
            RunFolderError: its file has other content.
        """
        try:
            content = self.rate.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=RequestedRate).lr
        except msgspec.MsgspecError as error:
            raise RunFolderError(self.path, f"{self.rate.name} was not written by trainer set-lr ({error})") from error

    def clear_requested_rate(self, rate: float) -> None:
        """Remove the request for ``rate``; a newer request stays."""
        if self.requested_rate() == rate:
            self.rate.unlink(missing_ok=True)

    def append(self, record: msgspec.Struct | dict[str, Any]) -> None:
        """Append a line to the log."""
        with self.log.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")

    def write_summary(self, summary: msgspec.Struct) -> None:
        """Replace summary.json."""
        _write_json(self.summary, summary)


def newest_run(parent: Path) -> Path | None:
    """Return the newest run under ``parent`` that has a checkpoint, None if there is none."""
    runs = [run for run in parent.glob("*/config.json") if RunFolder(run.parent).newest_checkpoint()]
    return max(runs, key=lambda config: config.stat().st_mtime).parent if runs else None


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """Return the checkpoint at ``path``: the file itself, or the newest one of a run's folder.

    Args:
        path: file or folder.
        best: take the folder's checkpoint of the lowest validation error instead.

    Raises:
        RunFolderError: a folder without a checkpoint.
    """
    if not path.is_dir():
        return path
    if best:
        found = RunFolder(path).checkpoints / checkpoint.BEST
        if not found.is_file():
            raise RunFolderError(path, f"it has no {checkpoint.BEST} yet, which the first validation writes")
        return found
    newest = RunFolder(path).newest_checkpoint()
    if newest is None:
        raise RunFolderError(path, "it has no checkpoint yet")
    return newest


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the old content or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)  # in the same folder: a rename is atomic only within a file system
    part.replace(path)


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _make(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise RunFolderError(path, "it is not empty; choose another, or continue its run with --resume auto")
    return path


def _make_named(parent: Path) -> Path:
    """Create a folder named by the time; runs started in the same second get different names."""
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    for name in itertools.chain([stamp], (f"{stamp}-{n}" for n in itertools.count(2))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise AssertionError("itertools.count has no end")


def _versions() -> dict[str, str]:
    """Return the versions of all installed libraries, and of CUDA and cuDNN in torch."""
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    built = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return dict(sorted(found.items())) | {name: str(version) for name, version in built.items() if version}


def _machine() -> dict[str, Any]:
    """Return facts about this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}


def _commit() -> str | None:
    """Return the git commit of this code, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
