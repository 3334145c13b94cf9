"""The results of ``make gpu`` as JSON: written after every figure, so that a killed run loses only the figure under way."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tools.errors import ToolFailed
from tools.gpu.parts import Part

FORMAT: Final = 1


class Status(StrEnum):
    """The end of a piece of a part."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"


class Row(msgspec.Struct, frozen=True, tag=True):
    """Base of all figures.

    Fields:
        name: name of the figure, unique within its piece; a later row with the same name replaces the earlier one.
        problem: reason why there is no figure; empty if there is one.
    """

    name: str
    problem: str = ""


class Marked(Row, frozen=True):
    """Outcome of the tests marked ``gpu``.

    Fields:
        passed, failed, skipped: numbers of tests.
        failures: name and message of each failed test.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = []


class Agreement(Row, frozen=True):
    """Differences between a faster form and the plain one. All errors are relative, 0 is equal.

    Fields:
        form: name of the form.
        layout: layout of the towers.
        loss: largest difference of a loss in the steps compared.
        gradient: difference of the whole gradient in the first step, by Euclidean norm.
        worst: largest difference of one parameter's gradient in the first step, likewise.
        where: that parameter.
        update: difference of the change of all parameters over the steps, likewise.
        agrees: whether all are within the tolerances.
    """

    form: str = ""
    layout: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    worst: float = 0.0
    where: str = ""
    update: float = 0.0
    agrees: bool = False


class Rate(Row, frozen=True):
    """Training steps on one batch of noise that stays on the device.

    Fields:
        title: name for people.
        batch: images in a step.
        images_per_s: rate in each round.
        used: share of the device's peak arithmetic (MFU), 0 to 1; None if unknown.
        peer: whether this is another project's network.
    """

    title: str = ""
    batch: int = 0
    images_per_s: list[float] = []
    used: float | None = None
    peer: bool = False


class Fed(Row, frozen=True):
    """Training steps on batches from a node on the same machine, or the same steps on one batch of noise.

    Fields:
        path: how batches reach the device.
        codec: codec of the records, ``raw`` or ``jpeg``.
        batch: images in a step.
        form: name of the form.
        workers: worker processes of the node.
        images_per_s: rate in each round.
        waits: share of the training thread's time in each stage, 0 to 1.
    """

    path: str = ""
    codec: str = ""
    batch: int = 0
    form: str = ""
    workers: int = 0
    images_per_s: list[float] = []
    waits: dict[str, float] = {}


class Loading(Row, frozen=True):
    """A loader alone, without training.

    Fields:
        title: name for people.
        codec: codec of its records, ``raw`` or ``jpeg``.
        workers: worker processes or threads.
        images_per_s: rate in each round.
    """

    title: str = ""
    codec: str = ""
    workers: int = 0
    images_per_s: list[float] = []


class Learned(Row, frozen=True):
    """A training run on CIFAR-10.

    Fields:
        form: name of the form.
        epochs, of_epochs: epochs done, and epochs of the whole run.
        centre_error: top-1 error of the newest epoch, centre crop, 0 to 1; None before the first.
        ten_crop_error: top-1 error with ten crops, 0 to 1; None if not evaluated.
        images_per_s: rate of training, waiting included.
        waiting_share: share of the training time spent waiting for data, 0 to 1.
    """

    form: str = ""
    epochs: int = 0
    of_epochs: int = 0
    centre_error: float | None = None
    ten_crop_error: float | None = None
    images_per_s: float = 0.0
    waiting_share: float = 0.0


_R = TypeVar("_R", bound=Row)

AnyRow = Marked | Agreement | Rate | Fed | Loading | Learned


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line that a worker prints for the runner.

    Fields:
        piece: name of the piece.
        row: a figure; None at the beginning and the end of the piece.
        status: how the piece ended; None before that.
        reason: one sentence, if it failed.
    """

    piece: str
    row: AnyRow | None = None
    status: Status | None = None
    reason: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """The end of a piece.

    Fields:
        status: how it ended.
        reason: one sentence, empty if it is done.
        seconds: time that it took.
    """

    status: Status
    reason: str
    seconds: float


class Machine(msgspec.Struct, frozen=True):
    """The machine and software of a run.

    Fields:
        gpus: name of each GPU; empty in a dry run.
        memory_gib: memory of the first GPU.
        torch, cuda, python: versions; ``cuda`` is empty without CUDA.
        host: processor, cores, memory and system, for people.
    """

    gpus: tuple[str, ...]
    memory_gib: float
    torch: str
    cuda: str
    python: str
    host: str


class Results(msgspec.Struct):
    """All results on one machine.

    Fields:
        format: number of this format.
        dry: whether they are of a dry run, whose figures mean nothing.
        machine: None before the first run.
        started, changed: UTC, for people.
        parts: the parts of the newest run, for what was not measured.
        outcomes: outcome of each piece that ended, by ``part/piece``.
        rows: figures of each piece, by ``part/piece``.
        attempts: number of times that each part ended, also at its limit.
    """

    format: int = FORMAT
    dry: bool = False
    machine: Machine | None = None
    started: str = ""
    changed: str = ""
    parts: list[Part] = []
    outcomes: dict[str, Outcome] = {}
    rows: dict[str, list[AnyRow]] = {}
    attempts: dict[str, int] = {}

    def put(self, piece: str, row: AnyRow) -> None:
        """Add a figure to a piece, or replace the one of the same name."""
        self.rows[piece] = [each for each in self.rows.get(piece, []) if each.name != row.name] + [row]

    def done(self, piece: str) -> bool:
        """Return whether a piece has ended well."""
        return piece in self.outcomes and self.outcomes[piece].status is Status.DONE

    def forget(self, part: str) -> None:
        """Remove everything about a part."""
        for table in (self.outcomes, self.rows):
            for piece in [each for each in table if each.partition("/")[0] == part]:
                del table[piece]
        self.attempts.pop(part, None)

    def of(self, part: str, kind: type[_R]) -> list[_R]:
        """Return the figures of one kind in a part, in the order in which they came."""
        return [
            row
            for piece, rows in self.rows.items()
            for row in rows
            if piece.partition("/")[0] == part and isinstance(row, kind)
        ]


def load(path: Path) -> Results | None:
    """Read a results file; None if there is none.

    Raises:
        ToolFailed: it cannot be read, or is of another format.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ToolFailed(f"{path} cannot be read: {error.strerror}.") from error
    try:
        results = msgspec.json.decode(content, type=Results)
    except msgspec.MsgspecError as error:
        raise ToolFailed(
            f"{path} does not hold results of `make gpu` ({error}); move it away, or name another file with --results."
        ) from error
    if results.format != FORMAT:
        raise ToolFailed(
            f"{path} has format {results.format}, but this version reads {FORMAT}; move it away, or name another file "
            "with --results."
        )
    return results


def save(path: Path, results: Results) -> None:
    """Write a results file; a kill at any moment leaves the old file or the new one.

    Raises:
        ToolFailed: it cannot be written.
    """
    write(path, msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def write(path: Path, content: bytes) -> None:
    """Write a file and give it its name last.

    Raises:
        ToolFailed: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ToolFailed(f"{path} cannot be written: {error.strerror}.") from error
