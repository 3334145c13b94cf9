"""What a trained network sees in any picture file."""

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
    """A class and the probability that the network gives it, 0 to 1."""

    name: str
    probability: float


class Prediction(msgspec.Struct, frozen=True):
    """The best guesses for a picture, the most probable first; five, or as many as there are classes."""

    image: str
    guesses: list[Guess]


def predict(run: Path, images: Sequence[Path], devices: Sequence[str]) -> Iterator[Prediction]:
    """Classify pictures by a run's newest checkpoint: prepared as the training data were.

    Raises:
        TrainerError: there is no such checkpoint, or it cannot be used.
        LoaderServiceError: a file that is no picture.
    """
    device = choose_device(devices)
    member, facts = load_member(run, device)
    for path in images:
        pixels, windows = load_image(path, facts)
        with torch.inference_mode():
            probabilities = member.probabilities([pixels.to(device)], windows, views=1)[0]
        best = probabilities.topk(min(TOP, len(facts.class_names)))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield Prediction(str(path), [Guess(facts.class_names[label], probability) for label, probability in guesses])
