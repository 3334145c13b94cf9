"""The parts of ``make gpu``, the most telling first, and the pieces of each."""

from __future__ import annotations

import importlib.util
import os
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from tools.gpu.measure import forms

WORKER_COUNTS: Final = (16, 8, 4, 2, 1)
"""Workers of every loader; the largest first, since it is the most telling."""

CODECS: Final = ("raw", "jpeg")

DRY_FEEDS: Final = ("slots, raw, batch 4", "trainer, jpeg, batch 4")


class Name(StrEnum):
    """The parts, in the order in which they run."""

    TESTS = "tests"
    AGREEMENT = "agreement"
    SPEED = "speed"
    FEED = "feed"
    LOADERS = "loaders"
    CIFAR10 = "cifar10"
    FLOAT32 = "float32"


class Settings(msgspec.Struct, frozen=True):
    """Settings of a run, which its workers get as JSON.

    Paths are strings, which JSON has.

    Fields:
        dry: tiny sizes, on a CPU.
        device: device of one-device measurements.
        gpus: number of GPUs.
        batches: batch sizes.
        width: width of the network.
        rounds, seconds: turns of each contestant, and the length of each.
        folder: folder for data, logs and runs.
        records: number of records of the data made on the spot.
        workers: worker processes of a node that feeds a GPU.
        together: contestants that hold the GPU at once.
        photographs: folder or archive that records are cut from; None to make synthetic ones.
        cifar10: archive of CIFAR-10; None if there is none.
        form: form that feeds and trains.
        left_s: time for this worker.
    """

    dry: bool
    device: str
    gpus: int
    batches: tuple[int, ...]
    width: float
    rounds: int
    seconds: float
    folder: str
    records: int
    workers: int
    together: int
    photographs: str | None
    cifar10: str | None
    form: str
    left_s: float = 0.0

    @property
    def work(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)


class Part(msgspec.Struct, frozen=True):
    """A part.

    Fields:
        name: its name.
        title: name for people.
        limit_s: time that it may take in one call of the command.
        piece_limit_s: time that one of its pieces may take.
        pieces: names of its pieces, in order.
        without: reason for each piece that cannot run here, by its name.
    """

    name: Name
    title: str
    limit_s: float
    piece_limit_s: float
    pieces: list[str]
    without: dict[str, str] = {}


def parts(settings: Settings) -> list[Part]:
    """Return all parts of a run, in order."""
    feeds = [
        f"{path}, {codec}, batch {batch}"
        for batch in settings.batches
        for codec in CODECS
        for path in ("trainer", "slots")
    ]
    counts = [count for count in WORKER_COUNTS if count <= (os.cpu_count() or 1)]
    no_archive = (
        {} if settings.cifar10 or settings.dry else {"run": "no archive of CIFAR-10: name it with --cifar10 FILE"}
    )
    batches = [f"batch {batch}" for batch in settings.batches]
    return [
        Part(Name.TESTS, "Tests marked `gpu`", 150, 150, ["pytest"]),
        Part(Name.AGREEMENT, "Faster forms against the plain one", 240, 90, agreements(settings)),
        Part(Name.SPEED, "Speed beside torchvision's AlexNet", 440, 220, batches),
        Part(Name.FEED, "Fed by a node on the same machine", 480, 220, list(DRY_FEEDS) if settings.dry else feeds),
        Part(
            Name.LOADERS,
            "Loaders alone",
            420,
            150,
            ["1 worker"] if settings.dry else [workers_piece(count) for count in counts],
        ),
        Part(Name.CIFAR10, "CIFAR-10 by the paper's recipe", 1800, 1800, ["run"], no_archive),
        Part(Name.FLOAT32, "Speed of the float32 forms", 440, 220, [] if settings.dry else batches),
    ]


def workers_piece(count: int) -> str:
    """Return the name of a piece that measures loaders with so many workers."""
    return f"{count} worker{'s' if count > 1 else ''}"


def agreements(settings: Settings) -> list[str]:
    """Return the pieces of the comparison: ``form @ layout``, forms with bfloat16 first, since they are to be fast."""
    layouts = ["one device", "two streams" if settings.gpus < 2 else "two devices"]
    chosen = sorted(forms.names(settings.dry), key=lambda form: not form.startswith("bf16"))
    every = [f"{form} @ {layout}" for layout in layouts for form in chosen]
    every.sort(key=lambda piece: not piece.startswith("bf16"))
    return [piece for piece in every if piece != f"{forms.PLAIN} @ one device"]  # it is the reference


def installed(module: str) -> bool:
    """Return whether this Python has a module, without importing it; a package of another name space counts as absent."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
