"""This project's trainer as a contestant: whole training steps on one device, as ``trainer run`` makes them.

``python -m tools.bench.steps --batch 128 --device cuda --speed '{"amp": "bf16"}'`` trains repeatedly on one batch of noise
that stays on the device; with ``--data DIR`` it trains on batches from a private node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import click
import msgspec
import torch
from torch.nn import functional

from tools.bench.turns import deliver
from trainer.config import Source
from trainer.data.feed import DeviceBatch, Feed, open_source
from trainer.data.normalisation import MeanSubtraction, Windows
from trainer.model.alexnet import AlexNet
from trainer.model.dropout import MaskPlan
from trainer.model.rng import DropoutKey
from trainer.model.speed import Speed, numerics
from trainer.optimizer import PaperSGD

CLASSES = 1000
RECORD, CROP = 256, 224
STEPS_BETWEEN_READINGS = {"cpu": 1, "cuda": 20}
"""Steps between two synchronisations. A GPU must be idle when the time is read, but seldom, to stay busy."""

EPOCHS = 1 << 20
"""Practically endless."""


@click.command()
@click.option("--batch", type=click.IntRange(1), required=True, help="Images in a step.")
@click.option("--width", type=float, default=1.0, help="Width of the network.")
@click.option("--device", default="cpu", help="Device of both towers.")
@click.option("--speed", default="{}", help="Fields of trainer.model.speed.Speed, as JSON.")
@click.option("--data", type=click.Path(path_type=Path), help="Dataset directory.  [default: one batch of noise]")
@click.option("--workers", type=int, default=2, help="Worker processes of the node.")
def main(batch: int, width: float, device: str, speed: str, data: Path | None, workers: int) -> None:
    """Train in turns, as a contestant."""
    torch.manual_seed(0)
    place = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(numerics(deterministic=False))  # as in a run
        if data is None:
            # A constant mean image, (256, 256, 3) float32: its values do not change the cost of the subtraction.
            batches, classes, mean = again(noise(batch, place)), CLASSES, torch.full((RECORD, RECORD, 3), 120.0)
        else:
            node = stack.enter_context(open_source(Source(data=str(data), workers=workers)))
            # Entered after its node, so closed before it.
            feed = stack.enter_context(Feed(node, "train", "train", batch, (place,), epochs=EPOCHS))
            batches, classes, mean = feed, len(feed.facts.class_names), feed.facts.mean
        model = AlexNet(classes, width, devices=(place,), speed=msgspec.json.decode(speed, type=Speed))
        if data is not None:
            feed.draw_masks(MaskPlan(DropoutKey(0, 0), model.dropout_units()))  # as in a run
        step = stepper(model, MeanSubtraction(mean, model.preset, (place,)))
        deliver(chunks(step, batches, place))


def again(batch: DeviceBatch) -> Iterator[DeviceBatch]:
    """Yield the same batch endlessly."""
    while True:
        yield batch


def noise(size: int, device: torch.device) -> DeviceBatch:
    """Return a batch of random pixels, (size, 224, 224, 3) uint8, and labels, (size,) int64, on ``device``."""
    images = torch.randint(0, 256, (size, CROP, CROP, 3), dtype=torch.uint8).to(device)
    labels = torch.randint(0, CLASSES, (size,)).to(device)
    # Epoch 0, one view of each image; the labels serve as record numbers, too.
    return DeviceBatch((images,), (Windows.centre(size, RECORD, CROP, device),), labels, labels, 0, 1)


def stepper(model: AlexNet, centre: MeanSubtraction) -> Callable[[DeviceBatch], int]:
    """Return a function that makes one training step, as ``trainer run`` does but without logs, and returns its images."""
    optimizer = PaperSGD(model.train(), model.preset, lr=1e-4, fused=bool(model.speed.fused_sgd))
    numbers = count()

    def step(batch: DeviceBatch) -> int:
        optimizer.zero_grad()
        # A new step number draws new dropout masks, as in a run; the cost of drawing is part of a step.
        logits = model(centre(batch.images, batch.windows), batch.dropout(DropoutKey(0, next(numbers))))
        torch.autograd.backward(functional.cross_entropy(logits, batch.labels))
        optimizer.step()
        return len(batch.labels)  # a shape, known on the host: does not wait for the GPU

    return step


def chunks(step: Callable[[DeviceBatch], int], batches: Iterator[DeviceBatch], device: torch.device) -> Iterator[int]:
    """Yield the images of a few steps at a time, once the device has finished them."""
    while True:
        images = sum(step(next(batches)) for _ in range(STEPS_BETWEEN_READINGS[device.type]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels run asynchronously; an image counts when its step is done
        yield images


if __name__ == "__main__":
    main()
