"""The optimiser follows the paper's rule, also across a drop of the learning rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.model.presets import PRESETS
from trainer.optimizer import PaperSGD

RATES = (0.01, 0.01, 0.01, 0.001, 0.001, 0.0001)


def layer() -> nn.Linear:
    made = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.arange(12.0, dtype=torch.float64).view(3, 4) / 10)
        made.bias.copy_(torch.arange(3.0, dtype=torch.float64))
    return made


def gradients() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(3, 4)), rng.normal(size=3)) for _ in RATES]


def by_the_rule(w: np.ndarray, grads: list[np.ndarray], rate: float, decay: float) -> np.ndarray:
    """Apply section 5: v <- .9 v - .0005 lr w - lr g; w <- w + v."""
    v = np.zeros_like(w)
    for lr, g in zip(RATES, grads, strict=True):
        v = 0.9 * v - decay * rate * lr * w - rate * lr * g
        w = w + v
    return w


@pytest.mark.parametrize(
    ("preset", "bias_rate", "bias_decay"), [("paper", 1.0, 0.0005), ("original", 2.0, 0.0)], ids=["paper", "original"]
)
def test_steps_are_the_papers_across_drops(preset: str, bias_rate: float, bias_decay: float) -> None:
    """Six steps with two drops of the rate equal the rule, with the preset's rate and decay of the biases."""
    model = layer()
    weight, bias = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    optimizer = PaperSGD(model, PRESETS[preset], RATES[0])
    for lr, (of_weight, of_bias) in zip(RATES, gradients(), strict=True):
        optimizer.set_lr(lr)
        model.weight.grad, model.bias.grad = torch.from_numpy(of_weight), torch.from_numpy(of_bias)
        optimizer.step()
    expected_weight = by_the_rule(weight, [g for g, _ in gradients()], 1.0, 0.0005)
    expected_bias = by_the_rule(bias, [g for _, g in gradients()], bias_rate, bias_decay)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected_weight, rtol=1e-12)
    np.testing.assert_allclose(model.bias.detach().numpy(), expected_bias, rtol=1e-12)


def test_momentum_survives_a_save() -> None:
    """An optimiser with another's momentum makes the same steps, bit for bit, also if the rate changes at the save."""
    one, other = layer(), layer()
    first = PaperSGD(one, PRESETS["original"], 0.01)
    grads = gradients()
    for of_weight, of_bias in grads[:3]:
        one.weight.grad, one.bias.grad = torch.from_numpy(of_weight), torch.from_numpy(of_bias)
        first.step()
    other.load_state_dict(one.state_dict())
    second = PaperSGD(other, PRESETS["original"], 0.001)
    assert not any(velocity.any() for velocity in second.momentum().values())
    second.load_momentum(first.momentum())
    for model, optimizer in ((one, first), (other, second)):
        optimizer.set_lr(0.001)
        model.weight.grad, model.bias.grad = map(torch.from_numpy, grads[3])
        optimizer.step()
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("fused", [True, False])
def test_momentum_is_the_papers_velocity(fused: bool) -> None:
    """``momentum`` returns v, the last step's change of w, whatever the rate is then; v itself changes no more."""
    model = layer()
    optimizer = PaperSGD(model, PRESETS["original"], 0.01, fused)
    for lr, (of_weight, of_bias) in zip(RATES, gradients(), strict=True):
        optimizer.set_lr(lr)
        before = model.weight.detach().clone(), model.bias.detach().clone()
        model.weight.grad, model.bias.grad = torch.from_numpy(of_weight), torch.from_numpy(of_bias)
        optimizer.step()
        optimizer.set_lr(lr / 3)
        velocity = optimizer.momentum()
        assert torch.equal(before[0] + velocity["weight"], model.weight)
        assert torch.equal(before[1] + velocity["bias"], model.bias)
