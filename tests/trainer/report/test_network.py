"""The drawing of the network, measured on the model."""

from __future__ import annotations

from collections.abc import Callable

from trainer.model.ablation import Ablation
from trainer.model.alexnet import AlexNet
from trainer.report import network

Words = Callable[[str], list[str]]


def test_the_network_is_measured_on_the_model() -> None:
    """At full width the layers have the paper's sizes, exchanges and 60,965,224 parameters."""
    layers = network.measure(AlexNet(), 224)
    assert {layer.name: layer.parameters for layer in layers} == {
        "input": 0,
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    }
    assert [layer.name for layer in layers if layer.exchanged] == ["conv3", "fc6", "fc7", "fc8"]
    sides = [layer.made for layer in layers[1:6]]
    assert sides == [(48, 55, 55), (128, 27, 27), (192, 13, 13), (192, 13, 13), (128, 13, 13)]


def test_the_drawing_has_sizes_and_parameters(words: Words) -> None:
    """Both towers are named, and each layer has its size, kernels and parameters."""
    figure = network.figure(AlexNet(7, width=0.05, crop=64), 64)
    shown = words(figure.svg())
    assert {"tower 0", "tower 1", "conv3", "7 units", "11\N{MULTIPLICATION SIGN}11, stride 4"} <= set(shown)
    assert "Orange lines are exchanges" in figure.caption


def test_an_ablated_network_is_drawn_as_it_is(words: Words) -> None:
    """One tower has no exchanges, missing layers are missing, and the operations after a layer are the model's."""
    ablation = Ablation(activation="tanh", lrn=False, pooling="plain", without=("conv5", "fc7"))
    model = AlexNet(5, width=0.05, towers=1, ablation=ablation, crop=64)
    model.train()
    figure = network.figure(model, 64)
    assert model.training
    assert [layer["name"] for layer in figure.data] == ["input", "conv1", "conv2", "conv3", "conv4", "fc6", "fc8"]
    assert not any(layer["exchanged"] for layer in figure.data)
    assert [layer["then"] for layer in figure.data][1:5] == ["tanh, pool 2", "tanh, pool 2", "tanh", "tanh, pool 2"]
    assert "tower 0" not in words(figure.svg())
    assert figure.table[-1][-1] == f"{sum(p.numel() for p in model.parameters()):,}"
