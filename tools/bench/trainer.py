"""``make bench-trainer``: the trainer's speed with each switch, and torchvision's AlexNet, in one run on this machine.

All of them are alive at once and take turns, so that a machine that gets slower slows them all.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
import msgspec
import torch

from loader_service.cli.job import CONTEXT, Job
from tools.bench.contest import ROOT, Contestant, Running
from tools.bench.document import machine
from tools.bench.venvs import NotInstalled, python_of
from tools.errors import ToolFailed
from trainer.model.alexnet import IMAGE_SIDE_PX, Sizes
from trainer.model.flops import peak_flops, training_flops
from trainer.model.speed import Speed

DOCUMENT: Final = ROOT / "docs" / "trainer-benchmarks.md"
WARM_SHARE: Final = 0.2
PEER: Final = "torchvision"
BARS: Final = {128: 32_000, 512: 49_000}
"""Images per second at these batch sizes, on synthetic data on one H100."""

FED_SHARE: Final = 0.98
"""What training from a node must keep of the speed on synthetic data."""

FORMS: Final[dict[str, Speed]] = {
    "float32": Speed(),
    "float32, plain SGD": Speed(fused_sgd=False),
    "float32, not channels-last": Speed(channels_last=False),
    "float32, fused LRN": Speed(fused_norm=True),
    "bf16": Speed(amp="bf16"),
    "bf16, fused LRN": Speed(amp="bf16", fused_norm=True),
    "bf16, compiled": Speed(amp="bf16", compile=True),
    "bf16, graphs": Speed(amp="bf16", cuda_graphs=True),
    "bf16, fused LRN, graphs": Speed(amp="bf16", fused_norm=True, cuda_graphs=True),
    "bf16, fused LRN, compiled, graphs": Speed(amp="bf16", fused_norm=True, compile=True, cuda_graphs=True),
}
"""Each switch on its own, and together."""


class Line(msgspec.Struct, frozen=True):
    """A contestant's figures.

    Fields:
        title: for people.
        batch: images in a step.
        images_per_s: of each round.
        used: share of the device's peak arithmetic; None where that is not known.
    """

    title: str
    batch: int
    images_per_s: list[float]
    used: float | None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.images_per_s)


class Settings(msgspec.Struct, frozen=True):
    """What a run was asked for; see the options."""

    device: str
    batches: tuple[int, ...]
    width: float
    rounds: int
    seconds: float
    data: Path | None
    workers: int


def contestants(settings: Settings, batch: int, peer: Path | None) -> list[tuple[Contestant, Speed | None]]:
    """All that compete at a batch size, with their forms; a peer has none."""
    found: list[tuple[Contestant, Speed | None]] = []
    cuda = torch.device(settings.device).type == "cuda"
    forms = {name: speed for name, speed in FORMS.items() if cuda or not speed.cuda_graphs}
    common = ("--batch", str(batch), "--width", str(settings.width), "--device", settings.device)
    base = (sys.executable, "-m", "tools.bench.steps", *common)
    for name, speed in forms.items():
        command = (*base, "--speed", msgspec.json.encode(speed).decode())
        found.append((Contestant(name, name, "", "ours", command), speed))
        if settings.data and name == list(forms)[-1]:
            fed: tuple[str, ...] = (*command, "--data", str(settings.data), "--workers", str(settings.workers))
            found.append((Contestant("fed", f"{name}, fed by a node", "", "ours", fed), speed))
    if peer:
        theirs = (str(peer), "-m", "tools.bench.peers.torchvision", str(batch), settings.device)
        found.append((Contestant(PEER, "torchvision's AlexNet, bf16, compiled", "", "peer", theirs), None))
    return found


def measure(settings: Settings, batch: int, peer: Path | None, missing: list[str]) -> list[Line]:
    """Every contestant's rounds at one batch size; a peer that does not run is out, and why goes to ``missing``."""
    with ExitStack() as stack:
        running = []
        for contestant, speed in contestants(settings, batch, peer):
            click.echo(f"batch {batch}: starting {contestant.name}", err=True)
            one = stack.enter_context(Running(contestant))
            try:
                one.wait()
            except ToolFailed as error:
                if contestant.kind != "peer":
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
        Line(one.contestant.title, batch, rates, _share_used(settings, speed, statistics.median(rates)))
        for (one, speed), rates in zip(running, turns, strict=True)
    ]


def _share_used(settings: Settings, speed: Speed | None, images_per_s: float) -> float | None:
    if speed is None:
        return None
    dtype = torch.bfloat16 if speed.amp == "bf16" else torch.float32
    peak = peak_flops([torch.device(settings.device)], dtype)
    work = training_flops(Sizes.of(2, settings.width), 1000, IMAGE_SIDE_PX, "overlapping")
    return images_per_s * work / peak if peak else None


def markdown(settings: Settings, lines: list[Line], versions: str, missing: list[str]) -> str:
    """The whole document."""
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
        _bars(settings, lines, name),
    ]
    parts += [f"Not measured: {why}" for why in dict.fromkeys(missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(lines: list[Line]) -> str:
    rows = ["| form | batch | images/s | MFU |", "|---|---:|---:|---:|"]
    for line in lines:
        low, high = min(line.images_per_s), max(line.images_per_s)
        used = "-" if line.used is None else f"{line.used:.1%}"
        rows.append(f"| {line.title} | {line.batch} | {line.median:,.0f} [{low:,.0f}, {high:,.0f}] | {used} |")
    return "\n".join(rows)


def _bars(settings: Settings, lines: list[Line], device: str) -> str:
    """What was aimed at, beside what was reached."""
    rows = []
    for batch in settings.batches:
        here = [line for line in lines if line.batch == batch]
        ours = [line for line in here if "torchvision" not in line.title and "fed" not in line.title]
        best = max(ours, key=lambda line: line.median)
        if batch in BARS and settings.width == 1 and "H100" in device:
            rows.append(f"- batch {batch}: {best.median:,.0f} images/s; the target is {BARS[batch]:,} on an H100.")
        for line in here:
            if "torchvision" in line.title:
                rows.append(f"- batch {batch}: {best.median / line.median:.2f} times torchvision's, by {best.title}.")
            if "fed" in line.title:
                share = line.median / next(each.median for each in ours if line.title.startswith(f"{each.title}, fed"))
                rows.append(f"- batch {batch}: fed by a node {share:.1%} of synthetic; the target is {FED_SHARE:.0%}.")
    return "\n".join(rows)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--device", default=None, help="cuda:0, cpu, ...  [default: a GPU if there is one]")
@click.option("--batch-sizes", default="128,512", show_default=True)
@click.option("--width", type=float, default=1.0, show_default=True, help="Of our network; torchvision's is whole.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each turn.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="A dataset: also measure with a node.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Of that node.")
@click.option("--peer/--no-peer", default=True, show_default=True, help="torchvision, in an environment of its own.")
@click.option("--document", type=click.Path(path_type=Path), default=DOCUMENT, help="Where to write the figures.")
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
    """Measure whole training steps with each switch, beside torchvision's AlexNet, and write a document."""
    try:
        sizes = tuple(int(word) for word in batch_sizes.split(","))
    except ValueError:
        raise click.BadParameter("whole numbers with commas between them, such as 128,512") from None
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
