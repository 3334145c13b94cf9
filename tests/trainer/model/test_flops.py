"""The arithmetic of a training."""

from __future__ import annotations

import pytest
import torch

from trainer.model import flops
from trainer.model.alexnet import Sizes
from trainer.model.flops import Arithmetic
from trainer.model.speed import numerics


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
        ("NVIDIA H100 NVL", Arithmetic.BFLOAT16, 835e12),
        ("NVIDIA H200", Arithmetic.BFLOAT16, 989e12),
        ("NVIDIA H200 NVL", Arithmetic.BFLOAT16, 835e12),
        ("NVIDIA GH200 480GB", Arithmetic.BFLOAT16, 989e12),
        ("NVIDIA H20", Arithmetic.BFLOAT16, 148e12),
        ("NVIDIA B200", Arithmetic.BFLOAT16, 2250e12),
        ("NVIDIA GB200", Arithmetic.BFLOAT16, 2500e12),
        ("NVIDIA A100-SXM4-40GB", Arithmetic.TF32, 156e12),
        ("NVIDIA A100-PCIE-40GB", Arithmetic.TF32, 156e12),
        ("NVIDIA A100 80GB PCIe", Arithmetic.TF32, 156e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", Arithmetic.TF32, None),
        ("NVIDIA A10", Arithmetic.BFLOAT16, 125e12),
        ("NVIDIA A10G", Arithmetic.BFLOAT16, 70e12),
        ("NVIDIA L4", Arithmetic.BFLOAT16, 121e12),
        ("NVIDIA L40", Arithmetic.BFLOAT16, 181e12),
        ("NVIDIA L40S", Arithmetic.BFLOAT16, 362e12),
        ("Tesla V100-SXM2-16GB", Arithmetic.FLOAT16, 125e12),
        ("Tesla V100-PCIE-16GB", Arithmetic.FLOAT16, 112e12),
        ("NVIDIA GeForce RTX 4090", Arithmetic.BFLOAT16, 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", Arithmetic.BFLOAT16, None),
        ("NVIDIA GeForce RTX 3090 Ti", Arithmetic.BFLOAT16, None),
        ("NVIDIA T400", Arithmetic.FLOAT16, None),
        ("Tesla T4", Arithmetic.TF32, 8.1e12),
        ("Tesla T4", Arithmetic.BFLOAT16, None),
        ("GeForce GTX 580", Arithmetic.FLOAT32, None),
    ],
)
def test_peaks_are_found_by_name(name: str, kind: Arithmetic, peak: float | None) -> None:
    """The longest matching name decides; unknown devices and parts of devices have no peak."""
    assert flops.peak_of(name, kind) == peak


@pytest.mark.parametrize(("deterministic", "peak"), [(False, 495e12), (True, 67e12)])
def test_the_peak_is_that_of_the_allowed_arithmetic(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, peak: float
) -> None:
    """float32 counts as TF32 unless --deterministic forbids that; bfloat16 has a peak of its own in both cases."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    with numerics(deterministic):
        assert flops.peak_flops([torch.device("cuda", 0)], torch.float32) == peak
        assert flops.peak_flops([torch.device("cuda", 0)], torch.bfloat16) == 989e12


def test_a_cpu_has_no_peak_of_its_own() -> None:
    """CPUs have no peak in the table."""
    assert flops.peak_flops([torch.device("cpu")], torch.float32) is None
