"""Export: the towers merged into one grouped network, and split again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.evaluation.export import Grouped, merge, split
from trainer.model.ablation import Ablation
from trainer.model.alexnet import AlexNet


def images(batch: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).normal(0, 60, (batch, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("preset", ["paper", "original"])
@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize(
    "ablation", [Ablation(), Ablation(without=("conv3", "fc6")), Ablation(activation="tanh", lrn=False)], ids=str
)
def test_the_grouped_network_gives_the_same_logits(preset: str, towers: int, ablation: Ablation) -> None:
    """The merged network gives the same logits for each preset, number of towers and ablation."""
    model = AlexNet(5, 0.1, preset, towers=towers, seed=2, ablation=ablation).eval()
    with torch.inference_mode():
        expected = model(images(3))
        torch.testing.assert_close(Grouped(model)(images(3)), expected, rtol=1e-3, atol=1e-5)
    assert expected.std() > 0


@pytest.mark.parametrize("towers", [1, 2])
def test_there_and_back(towers: int) -> None:
    """Tensors that were merged and split are equal, bit for bit."""
    model = AlexNet(5, 0.1, towers=towers)
    back = split(merge(model), towers)
    state = model.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_merged_shapes_are_the_grouped_papers() -> None:
    """The shapes are those of figure 2: 96 kernels of 3 channels, 256 of 48, 384 of 256."""
    shapes = {name: tuple(tensor.shape) for name, tensor in merge(AlexNet()).items() if name.endswith("weight")}
    assert shapes["conv1.weight"] == (96, 3, 11, 11)
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv3.weight"] == (384, 256, 3, 3)
    assert shapes["conv5.weight"] == (256, 192, 3, 3)
    assert shapes["fc6.weight"] == (4096, 9216)
