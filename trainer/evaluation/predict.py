"""Prediction of the classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from trainer.data.feed import load_image
from trainer.evaluation.evaluate import load_member
from trainer.evaluation.scores import TOP
from trainer.parallel.devices import choose_device


class Guess(msgspec.Struct, frozen=True):
    """A class and its probability, 0 to 1."""

    name: str
    probability: float


class Prediction(msgspec.Struct, frozen=True):
    """The most probable classes of an image, in falling order; five, or all if there are fewer."""

    image: str
    guesses: list[Guess]


def predict(run: Path, images: Sequence[Path], devices: Sequence[str]) -> Iterator[Prediction]:
    """Classify image files with a run's newest checkpoint, preprocessed like the training data.

    Raises:
        TrainerError: there is no checkpoint, or it cannot be used.
        LoaderServiceError: a file is no image.
    """
    device = choose_device(devices)
    member, facts = load_member(run, device)
    for path in images:
        pixels, windows = load_image(path, facts)  # (1, crop, crop, 3) uint8
        with torch.inference_mode():
            probabilities = member.probabilities([pixels.to(device)], [windows.to(device)], views=1)[0]  # (classes,)
        best = probabilities.topk(min(TOP, len(facts.class_names)))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield Prediction(str(path), [Guess(facts.class_names[label], probability) for label, probability in guesses])
