"""Top-1 and top-5 errors, and the averages of softmax outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.data.feed import DeviceBatch
from trainer.data.normalisation import MeanSubtraction, Windows
from trainer.evaluation.evaluate import Member, evaluate
from trainer.model.presets import PRESETS

CPU = torch.device("cpu")


class Fixed(nn.Module):
    """A network with fixed logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert len(images[0]) == len(self.logits)
        assert not self.training
        return self.logits


def member(logits: list[list[float]]) -> Member:
    return Member(Fixed(logits), MeanSubtraction(torch.zeros(256, 256, 3), PRESETS["paper"], (CPU,)))  # type: ignore[arg-type]


def batch(labels: list[int], views: int = 1) -> DeviceBatch:
    pictures = len(labels) * views
    pixels = torch.zeros(pictures, 224, 224, 3, dtype=torch.uint8)
    return DeviceBatch(
        (pixels,), (Windows.centre(pictures, 256, 224),), torch.tensor(labels), torch.arange(len(labels)), 0, views
    )


def log(probabilities: list[float]) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_top1_top5_and_loss() -> None:
    """Of six classes, the labels are the best, the fifth and the sixth guess."""
    row = log([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    result = evaluate([member([row] * 3)], [batch([0, 4, 5])])
    assert result.images == 3
    assert result.top1_error == pytest.approx(2 / 3)
    assert result.top5_error == pytest.approx(1 / 3)
    assert result.loss == pytest.approx(-sum(log([0.3, 0.07, 0.03])) / 3, rel=1e-6)


def test_probabilities_are_averaged_over_views() -> None:
    """The mean of softmax outputs over the crops of a record decides, not the mean of logits."""
    sure, unsure = [0.98, 0.01, 0.01], [0.001, 0.998, 0.001]
    result = evaluate([member([log(sure), log(unsure)])], [batch([1], views=2)])
    assert result.top1_error == 0
    assert result.loss == pytest.approx(-math.log((0.01 + 0.998) / 2), rel=1e-5)


def test_probabilities_are_averaged_over_networks() -> None:
    """Outputs of three networks are averaged, as the paper averages those of five and seven."""
    opinions = [[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]
    result = evaluate([member([log(opinion)]) for opinion in opinions], [batch([1])])
    assert result.top1_error == 0
    assert result.loss == pytest.approx(-math.log((0.4 + 0.4 + 0.9) / 3), rel=1e-5)


def test_fewer_classes_than_five() -> None:
    """The top-5 error of three classes is zero."""
    assert evaluate([member([log([0.5, 0.3, 0.2])])], [batch([2])]).top5_error == 0


def test_a_batch_of_another_size_counts_by_its_images() -> None:
    """Every image has the same weight, also in an epoch's short last batch."""
    model = member([log([0.9, 0.1])])
    first = evaluate([model], [batch([0]), batch([0]), batch([1])])
    assert first.images == 3
    assert first.top1_error == pytest.approx(1 / 3)


def test_an_impossible_guess_costs_a_finite_loss() -> None:
    """A probability of zero for the label gives a finite loss."""
    result = evaluate([member([[200.0, 0.0]])], [batch([1])])
    assert math.isfinite(result.loss)
    assert result.top1_error == 1
