"""Parameter statistics: mean |w| and mean |dw| of every parameter."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.model.alexnet import AlexNet
from trainer.model.presets import PRESETS
from trainer.optimizer import PaperSGD
from trainer.parallel.world import World
from trainer.run.param_stats import ParamStats, ParamStatsRecord, measure, suspect

ALONE = World((torch.device("cpu"),))


@pytest.mark.parametrize("preset", ["paper", "original"])
def test_they_are_what_the_step_did(preset: str) -> None:
    """dw is the change of a step, also of biases with their own rate and after a drop."""
    model = AlexNet(3, 0.05, preset)
    optimizer = PaperSGD(model, PRESETS[preset], 0.01)
    for lr in (0.01, 0.01, 0.001):
        optimizer.set_lr(lr)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        stats = measure(model, optimizer, ALONE)
        assert list(stats) == list(before)
        for name, parameter in model.named_parameters():
            assert stats[name].mean_w == pytest.approx(float(parameter.detach().abs().mean()), rel=1e-4)
            assert stats[name].mean_dw == pytest.approx(
                float((parameter.detach() - before[name]).abs().mean()), rel=1e-3
            )


def test_before_the_first_step_nothing_has_moved() -> None:
    """Without momentum, mean |dw| is 0."""
    model = AlexNet(3, 0.05)
    stats = measure(model, PaperSGD(model, PRESETS["paper"], 0.01), ALONE)
    assert {layer.mean_dw for layer in stats.values()} == {0.0}


def test_the_first_broken_layer_is_suspected() -> None:
    """The first damaged parameter is suspected, or the one with the largest earlier ratio if all are damaged."""
    sound = {"a.weight": ParamStats(1.0, 0.1), "b.weight": ParamStats(1.0, 0.5), "b.bias": ParamStats(0.0, 1.0)}
    assert suspect(sound, {}) == "b.weight"
    assert suspect(sound | {"b.bias": ParamStats(math.nan, 0.0)}, sound) == "b.bias"
    broken = dict.fromkeys(sound, ParamStats(math.nan, math.nan))
    assert suspect(broken, sound) == "b.weight"
    assert suspect(broken, {}) is None


def test_a_line_of_the_log_has_three_numbers_each() -> None:
    """A log line has mean |w|, mean |dw| and their ratio in four digits."""
    assert ParamStatsRecord.of(7, {"a": ParamStats(0.123456, 0.001)}).parameters == {"a": (0.1235, 0.001, 0.0081)}
