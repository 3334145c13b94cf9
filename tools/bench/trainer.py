"""``make bench-trainer``: the trainer's speed with each option, compared with torchvision's AlexNet on the same machine.

All contestants run at once and take turns, so that a machine that slows down affects them equally.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
from contextlib import ExitStack
from enum import Enum, auto
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import torch

from loader_service.cli.job import CONTEXT, Job
from tools.bench.contest import Contestant, Kind, Running
from tools.bench.contestants import NotInstalled, python_of
from tools.bench.report.document import machine
from tools.errors import ToolFailed
from tools.terminal import ROOT
from trainer.model.alexnet import IMAGE_SIDE_PX, Sizes
from trainer.model.flops import peak_flops, training_flops
from trainer.model.speed import Speed, numerics

DOCUMENT: Final = ROOT / "docs" / "trainer-benchmarks.md"
WARM_SHARE: Final = 0.2
PEER: Final = "torchvision"
FED: Final = "fed"
FED_TITLE: Final = ", fed by a node"
TARGETS: Final = {128: 32_000, 512: 49_000}
"""Target rates by batch size, images/s, on synthetic data on one H100."""

FED_SHARE: Final = 0.98
"""Target share of the rate on synthetic data for training from a node."""


def _form(channels_last: bool = True, fused_sgd: bool = True, **more: Any) -> Speed:
    """Return options that do not depend on the device, so that rates on several devices compare the same form."""
    return Speed(channels_last=channels_last, fused_sgd=fused_sgd, **more)


FORMS: Final[dict[str, Speed]] = {
    "float32": _form(),
    "float32, plain SGD": _form(fused_sgd=False),
    "float32, not channels-last": _form(channels_last=False),
    "float32, fused LRN": _form(fused_norm=True),
    "bf16": _form(amp="bf16"),
    "bf16, fused LRN": _form(amp="bf16", fused_norm=True),
    "bf16, compiled": _form(amp="bf16", compile=True),
    "bf16, graphs": _form(amp="bf16", cuda_graphs=True),
    "bf16, fused LRN, graphs": _form(amp="bf16", fused_norm=True, cuda_graphs=True),
    "bf16, fused LRN, compiled, graphs": _form(amp="bf16", fused_norm=True, compile=True, cuda_graphs=True),
}
"""Each option alone, and combinations."""


class Role(Enum):
    """The part of a contestant in the comparison."""

    SYNTHETIC = auto()
    FED = auto()
    PEER = auto()


class Measurement(msgspec.Struct, frozen=True):
    """A contestant's figures at one batch size.

    Fields:
        title: name for people.
        role: our form on synthetic data, that form fed by a node, or a peer.
        batch: images in a step.
        images_per_s: rate in each round.
        used: share of the device's peak arithmetic, 0 to 1; None if the peak is not known.
    """

    title: str
    role: Role
    batch: int
    images_per_s: list[float]
    used: float | None

    @property
    def median(self) -> float:
        """Median rate over the rounds, images/s."""
        return statistics.median(self.images_per_s)


class Settings(msgspec.Struct, frozen=True):
    """Options of a run; see the command."""

    device: str
    batches: tuple[int, ...]
    width: float
    rounds: int
    seconds: float
    data: Path | None
    workers: int


def contestants(settings: Settings, batch: int, peer: Path | None) -> list[tuple[Contestant, Speed | None]]:
    """Return the contestants at a batch size, each with its options; a peer has none."""
    found: list[tuple[Contestant, Speed | None]] = []
    cuda = torch.device(settings.device).type == "cuda"
    forms = {name: speed for name, speed in FORMS.items() if cuda or not speed.cuda_graphs}  # CUDA graphs need a GPU
    common = ("--batch", str(batch), "--width", str(settings.width), "--device", settings.device)
    base = (sys.executable, "-m", "tools.bench.steps", *common)
    for name, speed in forms.items():
        command = (*base, "--speed", msgspec.json.encode(speed).decode())
        found.append((Contestant(name, name, "", Kind.OURS, command), speed))
        if settings.data and name == list(forms)[-1]:  # the last form has every option of this device
            fed: tuple[str, ...] = (*command, "--data", str(settings.data), "--workers", str(settings.workers))
            found.append((Contestant(FED, f"{name}{FED_TITLE}", "", Kind.OURS, fed), speed))
    if peer:
        theirs = (str(peer), "-m", "tools.bench.peers.torchvision", str(batch), settings.device)
        found.append((Contestant(PEER, "torchvision's AlexNet, bf16, compiled", "", Kind.PEER, theirs), None))
    return found


def measure(settings: Settings, batch: int, peer: Path | None, missing: list[str]) -> list[Measurement]:
    """Measure every contestant at one batch size; for a peer that does not run, the reason is added to ``missing``."""
    with ExitStack() as stack:
        running = []
        for contestant, speed in contestants(settings, batch, peer):
            click.echo(f"batch {batch}: starting {contestant.name}", err=True)
            one = stack.enter_context(Running(contestant))
            try:
                # `ready` follows the first steps, so compilation and the capture of graphs are over before any turn.
                one.wait()
            except ToolFailed as error:
                if contestant.kind is not Kind.PEER:  # our own forms must run: a failure is an error
                    raise
                missing.append(str(error))
            else:
                running.append((one, speed))
        turns: list[list[float]] = [[] for _ in running]
        for number in range(settings.rounds):
            click.echo(f"batch {batch}: round {number + 1} of {settings.rounds}", err=True)
            for (one, _), rates in zip(running, turns, strict=True):
                rates.append(one.turn(WARM_SHARE * settings.seconds, settings.seconds).images_per_s)
    return [
        Measurement(
            one.contestant.title,
            _role(one.contestant),
            batch,
            rates,
            _share_used(settings, speed, statistics.median(rates)),
        )
        for (one, speed), rates in zip(running, turns, strict=True)
    ]


def _role(contestant: Contestant) -> Role:
    if contestant.kind is Kind.PEER:
        return Role.PEER
    return Role.FED if contestant.name == FED else Role.SYNTHETIC


def _share_used(settings: Settings, speed: Speed | None, images_per_s: float) -> float | None:
    if speed is None:  # a peer's network has another number of FLOPs
        return None
    dtype = torch.bfloat16 if speed.amp == "bf16" else torch.float32
    with numerics(deterministic=False):  # as in the contestants: the peak depends on the arithmetic that torch may use
        peak = peak_flops([torch.device(settings.device)], dtype)
    # Of the real network: 1,000 classes, two towers, overlapping pools.
    work = training_flops(Sizes.of(2, settings.width), 1000, IMAGE_SIDE_PX, "overlapping")
    return images_per_s * work / peak if peak else None


def markdown(settings: Settings, lines: list[Measurement], versions: str, missing: list[str]) -> str:
    """Return the whole document."""
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    now = datetime.datetime.now(datetime.UTC)
    parts = [
        "# The trainer's speed",
        "Written by `make bench-trainer` from one run; do not edit.",
        f"{now:%Y-%m-%d %H:%M} UTC on {name}; {machine()}; {versions}. Whole steps (centring, forward, backward, update), "
        f"both towers on one device, width {settings.width:g}, on one batch of noise that never leaves the device. Median "
        f"of {settings.rounds} rounds of {settings.seconds:g} s, lowest and highest in brackets; all took turns.",
        _table(lines),
        _targets(settings, lines, name),
    ]
    # Each reason once, though it recurs at each batch size.
    parts += [f"Not measured: {why}" for why in dict.fromkeys(missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(lines: list[Measurement]) -> str:
    rows = ["| form | batch | images/s | MFU |", "|---|---:|---:|---:|"]
    for line in lines:
        low, high = min(line.images_per_s), max(line.images_per_s)
        used = "-" if line.used is None else f"{line.used:.1%}"
        rows.append(f"| {line.title} | {line.batch} | {line.median:,.0f} [{low:,.0f}, {high:,.0f}] | {used} |")
    return "\n".join(rows)


def _targets(settings: Settings, lines: list[Measurement], device: str) -> str:
    """Compare the best rates with the targets."""
    rows = []
    for batch in settings.batches:
        here = [line for line in lines if line.batch == batch]
        ours = [line for line in here if line.role is Role.SYNTHETIC]
        best = max(ours, key=lambda line: line.median)  # never empty: measure() raises if a form of ours fails
        # The targets are for the whole network on that GPU.
        if batch in TARGETS and settings.width == 1 and "H100" in device:
            rows.append(f"- batch {batch}: {best.median:,.0f} images/s; the target is {TARGETS[batch]:,} on an H100.")
        for line in here:
            if line.role is Role.PEER:
                rows.append(f"- batch {batch}: {best.median / line.median:.2f} times torchvision's, by {best.title}.")
            if line.role is Role.FED:
                # The same form on synthetic data: titles differ by FED_TITLE alone.
                share = line.median / next(each.median for each in ours if line.title == f"{each.title}{FED_TITLE}")
                rows.append(f"- batch {batch}: fed by a node {share:.1%} of synthetic; the target is {FED_SHARE:.0%}.")
    return "\n".join(rows)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--device", default=None, help="cuda:0, cpu, ...  [default: a GPU if there is one]")
@click.option("--batch-sizes", default="128,512", show_default=True, help="Batch sizes, with commas between.")
@click.option("--width", type=float, default=1.0, show_default=True, help="Width of our network; torchvision's is 1.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Length of a turn.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    help="Dataset directory; also measures training from a node.",
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Worker processes of that node.")
@click.option(
    "--peer/--no-peer",
    default=True,
    show_default=True,
    help="Also measure torchvision, in a virtual environment of its own.",
)
@click.option("--document", type=click.Path(path_type=Path), default=DOCUMENT, help="Document to write.")
def main(
    device: str | None,
    batch_sizes: str,
    width: float,
    rounds: int,
    seconds: float,
    data: Path | None,
    workers: int,
    peer: bool,
    document: Path,
) -> None:
    """Measure training steps with each option, compare with torchvision's AlexNet, and write a document."""
    try:
        sizes = tuple(int(word) for word in batch_sizes.split(","))
    except ValueError:
        raise click.BadParameter("whole numbers with commas between them, such as 128,512") from None
    # Not an option's default: it depends on the machine.
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, sizes, width, rounds, seconds, data, workers)
    python: Path | None = None
    missing: list[str] = []
    if peer:
        try:
            click.echo("setting up torchvision's environment", err=True)
            python = python_of(PEER, ROOT)
        except NotInstalled as error:
            missing.append(str(error))
    lines = [line for size in sizes for line in measure(settings, size, python, missing)]
    if not lines:
        raise ToolFailed("nothing was measured.")
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(markdown(settings, lines, versions, missing))
    click.echo(f"wrote {document}")


if __name__ == "__main__":
    main()
