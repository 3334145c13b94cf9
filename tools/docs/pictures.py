"""`make pictures`: the pictures of README and docs, from a training on the demo's photographs.

Only photographs with a free licence of their own are used: the classes whose package states none are left out. The folder
of the pictures names the origin and licence of every photograph in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import click

from loader_service.cli.job import CONTEXT, Job
from tools.photographs import PACKAGE_LICENCE, PHOTOGRAPHS
from tools.sample_images import licences
from tools.terminal import ROOT, SAMPLE_IMAGES, heading, run
from trainer.model.alexnet import IMAGE_SIDE_PX, AlexNet
from trainer.report import network
from trainer.run.folder import RunFolder

BUILD: Final = Path("build/pictures")
TARGET: Final = Path("docs/pictures")

FREE: Final = tuple(each for each in PHOTOGRAPHS if each.licence != PACKAGE_LICENCE)

SHOWN: Final = ("curves", "guesses", "neighbours", "kernels", "confusion", "augmentation", "time", "ledger")
"""Figures of the report that README and docs show; the network is drawn at full width."""

TRAINING: Final = ("--width", "0.25", "--batch-size", "32", "--epochs", "16", "--schedule", "step", "--drop-at", "13")
"""As the demo's, with some epochs more and a drop of the rate: three minutes on two cores."""


def train(folder: Path, data: Path) -> None:
    """Preprocess the free photographs and train on them, or continue a training that was stopped."""
    heading("[1/3] Photographs with a free licence of their own")
    run("python", "-m", "tools.sample_images", str(SAMPLE_IMAGES))
    classes = ",".join(each.label for each in FREE)
    run("loader-service", "preprocess", str(SAMPLE_IMAGES), str(data), "--classes", classes)
    heading("[2/3] Training")
    run("trainer", "run", "--data", str(data), "--run", str(folder), *TRAINING, "--resume", "auto")


def draw(folder: Path, data: Path, target: Path) -> None:
    """Draw the report of a run and copy its figures, with the licences of the photographs, to ``target``."""
    heading("[3/3] Pictures")
    run("trainer", "report", str(folder), "--data", str(data), "--out", str(BUILD / "report"))
    target.mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        shutil.copyfile(ROOT / BUILD / "report" / f"{name}.svg", target / f"{name}.svg")
    whole = network.figure(AlexNet(), IMAGE_SIDE_PX)  # 1,000 classes, as in the paper
    (target / "network.svg").write_text(whole.svg(), encoding="utf-8")
    (target / "LICENSES.md").write_text(licences(FREE), encoding="utf-8")


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=BUILD / "run",
    show_default=True,
    help="Run folder of the training; a finished training is not repeated.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=TARGET, show_default=True, help="Folder of the pictures."
)
def main(folder: Path, out: Path) -> None:
    """Make the pictures of README and docs."""
    data = BUILD / "data"
    if not (RunFolder(ROOT / folder).summary.is_file() and (ROOT / data).is_dir()):
        train(folder, data)
    draw(folder, data, ROOT / out)


if __name__ == "__main__":
    main()
