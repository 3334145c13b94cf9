"""CIFAR-10 by the recipe of ``make cifar``, as far as the time goes; the next call resumes the run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tools.bench.records import photographs as read_photographs
from tools.errors import ToolFailed
from tools.gpu.measure import data, forms
from tools.gpu.parts import Settings
from tools.gpu.results import AnyRow, Learned
from tools.results import Evaluation, decode, read_summary
from tools.terminal import ROOT, stop

EPOCHS: Final = 90
LOOK_EVERY_S: Final = 10.0
"""Time between two looks at the run's summary."""

EVALUATION_S: Final = 60.0
"""Time kept for the ten-crop evaluation of 10,000 images."""

DRY_CLASSES, DRY_IMAGES = 2, 16
DRY_OPTIONS: Final = [
    "--width",
    "0.05",
    "--crop",
    "64",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--checkpoint-every",
    "0",
    "--devices",
    "cpu",
    "--no-fused-norm",
]


def run(settings: Settings, _piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Preprocess the archive if that has not been done, train, and evaluate with ten crops.

    Raises:
        ToolFailed: a command failed, or the time ended before the last epoch.
    """
    deadline_s = time.monotonic() + settings.left_s
    folder, of_epochs = settings.work / "cifar10", 1 if settings.dry else EPOCHS
    records, path = folder / "records", folder / "run"
    source = _tiny(folder / "images") if settings.dry else settings.cifar10
    size = ["--size", "72", "--workers", "1"] if settings.dry else []
    _run(["-m", "loader_service", "preprocess", str(source), str(records), *size], _left_s(deadline_s))
    chosen = _form_of(folder / "form.txt", settings.form)
    options = [*forms.arguments(chosen), "--workers", str(settings.workers), "--devices", settings.device]
    options += DRY_OPTIONS if settings.dry else []
    command = ["-m", "trainer", "run", "--data", str(records), "--run", str(path), "--resume", "auto", *options]

    def report(ten_crop_error: float | None = None) -> bool:
        if not (path / "summary.json").exists():
            return False
        summary = read_summary(path / "summary.json")
        centre = None if summary.accuracy is None else 1 - summary.accuracy
        rate, waiting = summary.images_per_s, summary.waiting_share
        emit(Learned("run", "", chosen, summary.epochs, of_epochs, centre, ten_crop_error, rate, waiting))
        return summary.finished

    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, text=True) as process:
        try:
            while process.poll() is None and _left_s(deadline_s) > EVALUATION_S:
                try:
                    process.wait(min(LOOK_EVERY_S, _left_s(deadline_s)))
                except subprocess.TimeoutExpired:
                    report()
            was_stopped = process.poll() is None
        finally:
            stop(process)  # by SIGTERM, on which the trainer saves a checkpoint
    if process.returncode and not was_stopped:
        raise ToolFailed(f"`trainer run` ended with exit code {process.returncode}; its last lines are in the log.")
    finished = report()
    if (path / "summary.json").exists() and read_summary(path / "summary.json").epochs:
        place = ["--data", str(records), "--devices", settings.device]
        shown = _run(
            ["-m", "trainer", "evaluate", str(path), *place, "--views", "ten-crop", "--json"], _left_s(deadline_s)
        )
        report(decode(shown, Evaluation, "`trainer evaluate --json`").top1_error)
    if not finished:
        raise ToolFailed("the time ended before the last epoch; the next call resumes the run.")


def _left_s(deadline_s: float) -> float:
    return max(1.0, deadline_s - time.monotonic())


def _form_of(marker: Path, form: str) -> str:
    """Return the form that the run was begun with, or begin it with ``form``: a run keeps its form."""
    if marker.exists() and (before := marker.read_text().strip()) in forms.FORMS:
        return before
    marker.write_text(form + "\n")
    return form


def _run(command: Sequence[str], limit_s: float) -> bytes:
    """Run a Python command; return what it printed.

    Raises:
        ToolFailed: it failed or took too long.
    """
    shown = " ".join(command[:3])
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"`python {shown}` took longer than {limit_s:.0f} s.") from None
    if done.returncode:
        raise ToolFailed(f"`python {shown}` ended with exit code {done.returncode}; its last lines are in the log.")
    return done.stdout


def _tiny(folder: Path) -> Path:
    """Make a few images in the layout of the archive: train/CLASS/*.jpg and test/CLASS/*.jpg."""
    pictures = read_photographs(data.photographs(folder.with_name("tiny"), DRY_CLASSES * 2))
    for number in range(DRY_CLASSES * DRY_IMAGES):
        split = "test" if number < DRY_CLASSES * 2 else "train"
        path = folder / split / f"class{number % DRY_CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % len(pictures)])
    return folder
