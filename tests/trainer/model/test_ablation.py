"""The paper's ablations: each changes the network, and networks without a layer still learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.errors import ConfigError
from trainer.model.ablation import REMOVABLE, Ablation
from trainer.model.alexnet import AlexNet, Sizes
from trainer.model.rng import DropoutKey
from trainer.optimizer import PaperSGD

SMALL = 0.05


def images(batch: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).normal(0, 60, (batch, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(pixels)


def made(**fields: object) -> AlexNet:
    return AlexNet(3, SMALL, ablation=Ablation(**fields))


@pytest.mark.parametrize(
    "fields", [{"activation": "tanh"}, {"lrn": False}, {"pooling": "plain"}, {"dropout": False}], ids=str
)
def test_each_switch_changes_the_network(fields: dict[str, object]) -> None:
    """With the same weights, an ablation gives other logits of the same shape."""
    plain, varied, pictures = made().eval(), made(**fields).eval(), images(2)
    varied.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert plain(pictures).shape == varied(pictures).shape == (2, 3)
        assert not torch.equal(plain(pictures), varied(pictures))


@pytest.mark.parametrize("layer", REMOVABLE)
@pytest.mark.parametrize("towers", [1, 2])
def test_a_net_without_a_layer_learns(layer: str, towers: int) -> None:
    """The layer's parameters are gone, all others get gradients, and steps on one batch lower its loss."""
    model = AlexNet(3, SMALL, towers=towers, ablation=Ablation(without=(layer,), dropout=False))
    assert not any(layer in name for name, _ in model.named_parameters())
    optimizer = PaperSGD(model, model.preset, 0.005)
    pictures, labels, losses = images(3), torch.arange(3), []
    for _ in range(4):
        loss = functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("layer", "parameters"), [("conv4", 663_936), ("fc7", 16_781_312)])
def test_parameters_without_a_layer(layer: str, parameters: int) -> None:
    """Removing a layer with as many outputs as inputs removes its parameters; the next layers read as much as before."""
    kept = Sizes.of(2, 1.0).fan_ins()
    left = Sizes.of(2, 1.0, (layer,)).fan_ins()
    assert {name: n for name, n in kept.items() if name != layer} == left
    assert 2 * Sizes.of(2, 1.0).counts()[layer] * (kept[layer] + 1) == parameters


def test_without_dropout_training_and_use_agree() -> None:
    """Without dropout, training and evaluation give the same logits."""
    model, pictures = made(dropout=False), images(2)
    with torch.inference_mode():
        trained = model(pictures, DropoutKey(0, 0))
        assert torch.equal(trained, model.eval()(pictures))


def test_tanh_starts_without_biases_of_one() -> None:
    """With tanh all biases start at 0."""
    assert not any(p.any() for name, p in made(activation="tanh").named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"without": ("conv1",)}, "--without=conv1 cannot work: expected one of conv2, conv3"),
        ({"without": ("conv3", "conv4", "conv5")}, "expected at least one of conv3, conv4 and conv5 to stay"),
        ({"activation": "gelu"}, "--activation=gelu cannot work: expected one of relu, tanh."),
        ({"pooling": "mean"}, "--pooling=mean cannot work: expected one of overlapping, plain."),
        ({"crops": False}, "expected also --no-flips and --no-jitter"),
    ],
)
def test_what_cannot_be_varied_is_named(fields: dict[str, object], sentence: str) -> None:
    """The error names the option, its value and the possible values, in one sentence."""
    with pytest.raises(ConfigError) as caught:
        Ablation(**fields)
    assert sentence in str(caught.value)
