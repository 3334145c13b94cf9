"""The arithmetic of a training."""

from __future__ import annotations

import pytest
import torch

from trainer.model import flops
from trainer.model.alexnet import Sizes
from trainer.model.flops import Arithmetic


def test_multiply_adds_of_the_paper() -> None:
    """Each layer has the paper's multiply-adds; an image takes 4.136 GFLOP forward and backward."""
    sizes = Sizes.of(2, 1.0)
    assert flops.multiply_adds(sizes, 1000, 224, "overlapping") == {
        "conv1": 105_415_200,
        "conv2": 223_948_800,
        "conv3": 149_520_384,
        "conv4": 112_140_288,
        "conv5": 74_760_192,
        "fc6": 37_748_736,
        "fc7": 16_777_216,
        "fc8": 4_096_000,
    }
    assert flops.training_flops(sizes, 1000, 224, "overlapping") == 2 * (3 * 724_406_816 - 105_415_200)
    assert flops.training_flops(sizes, 1000, 224, "plain") == flops.training_flops(sizes, 1000, 224, "overlapping")


def test_layers_that_are_left_out_cost_nothing() -> None:
    """A layer that is left out has no arithmetic, and the next layer has other inputs."""
    layers = flops.multiply_adds(Sizes.of(2, 1.0, ("conv4", "fc7")), 1000, 224, "overlapping")
    assert not layers.keys() & {"conv4", "fc7"}
    assert layers["fc8"] == 1000 * 4096


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Arithmetic.BFLOAT16, 989e12),
        ("NVIDIA H100 PCIe", Arithmetic.BFLOAT16, 756e12),
        ("NVIDIA A100-SXM4-40GB", Arithmetic.TF32, 156e12),
        ("Tesla T4", Arithmetic.TF32, 8.1e12),
        ("Tesla T4", Arithmetic.BFLOAT16, None),
        ("GeForce GTX 580", Arithmetic.FLOAT32, None),
    ],
)
def test_peaks_are_found_by_name(name: str, kind: Arithmetic, peak: float | None) -> None:
    """The first matching name decides; unknown devices have no peak."""
    assert flops.peak_of(name, kind) == peak


def test_a_cpu_has_no_peak_of_its_own() -> None:
    """CPUs have no peak in the table."""
    assert flops.peak_flops([torch.device("cpu")], torch.float32) is None
