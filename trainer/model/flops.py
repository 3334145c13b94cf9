"""The arithmetic of the model, and the model FLOP utilisation (MFU) of a training.

Only the model's own arithmetic counts: two operations per multiply-add of convolutions and fully connected layers, once
forward and twice backward (for inputs and for weights; conv1 needs no gradient of its input). At width 1 this is
4.136 GFLOP per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import torch

from trainer.model.alexnet import CONV1_PADDING, KERNELS, POOLING_SIDES, Sizes

TERA: Final = 1e12


class Arithmetic(StrEnum):
    """Number formats that GPUs multiply at different speeds."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    TF32 = "tf32"
    FLOAT32 = "float32"


PEAKS: Final[dict[str, dict[Arithmetic, float]]] = {
    "H200": {Arithmetic.BFLOAT16: 989, Arithmetic.FLOAT16: 989, Arithmetic.TF32: 495, Arithmetic.FLOAT32: 67},
    "H100 PCIe": {Arithmetic.BFLOAT16: 756, Arithmetic.FLOAT16: 756, Arithmetic.TF32: 378, Arithmetic.FLOAT32: 51},
    "H100": {Arithmetic.BFLOAT16: 989, Arithmetic.FLOAT16: 989, Arithmetic.TF32: 495, Arithmetic.FLOAT32: 67},
    "A100": {Arithmetic.BFLOAT16: 312, Arithmetic.FLOAT16: 312, Arithmetic.TF32: 156, Arithmetic.FLOAT32: 19.5},
    "A10G": {Arithmetic.BFLOAT16: 70, Arithmetic.FLOAT16: 70, Arithmetic.TF32: 35, Arithmetic.FLOAT32: 35},
    "L40S": {Arithmetic.BFLOAT16: 362, Arithmetic.FLOAT16: 362, Arithmetic.TF32: 183, Arithmetic.FLOAT32: 91.6},
    "L4": {Arithmetic.BFLOAT16: 121, Arithmetic.FLOAT16: 121, Arithmetic.TF32: 60, Arithmetic.FLOAT32: 30.3},
    "V100": {Arithmetic.FLOAT16: 125, Arithmetic.FLOAT32: 15.7},
    "T4": {Arithmetic.FLOAT16: 65, Arithmetic.FLOAT32: 8.1},
    "RTX 4090": {Arithmetic.BFLOAT16: 165, Arithmetic.FLOAT16: 165, Arithmetic.TF32: 82.6, Arithmetic.FLOAT32: 82.6},
    "RTX 3090": {Arithmetic.BFLOAT16: 71, Arithmetic.FLOAT16: 71, Arithmetic.TF32: 35.6, Arithmetic.FLOAT32: 35.6},
}
"""TFLOP/s of dense arithmetic with float32 accumulation, from the vendors' data sheets, for the first key that is a part of
the device's name. The sheets' sparse figures are twice as high and do not apply to a dense network."""


def multiply_adds(sizes: Sizes, num_classes: int, crop: int, pooling: str) -> dict[str, int]:
    """Return the multiply-adds of one image's forward pass by layer, both towers together.

    Args:
        sizes: sizes of the layers.
        num_classes: number of logits.
        crop: side of the images, in pixels.
        pooling: ``overlapping`` or ``plain``.
    """
    counts, fan_ins, places = sizes.counts(), sizes.fan_ins(), _places(crop, pooling)
    # Each of the units at each of the places reads fan_in inputs.
    layers = {name: sizes.towers * counts[name] * fan_ins[name] * places.get(name, 1) for name in counts}
    return layers | {"fc8": num_classes * fan_ins["fc8"]}


def training_flops(sizes: Sizes, num_classes: int, crop: int, pooling: str) -> int:
    """Return the FLOP of one image, forward and backward, both towers together; arguments as in ``multiply_adds``."""
    layers = multiply_adds(sizes, num_classes, crop, pooling)
    return 2 * (3 * sum(layers.values()) - layers["conv1"])  # no gradient of conv1's input


def peak_flops(devices: Sequence[torch.device], dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of ``devices`` together in ``dtype``; None if one of them is not in the table.

    float32 counts as TF32 if torch may use that: a utilisation of the lower float32 peak would be too flattering.
    """
    kind = Arithmetic(str(dtype).removeprefix("torch."))
    if dtype == torch.float32 and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        kind = Arithmetic.TF32
    total = 0.0
    for device in dict.fromkeys(devices):  # two towers on one device share its peak
        if device.type != "cuda":
            return None
        peak = peak_of(torch.cuda.get_device_name(device), kind)
        if peak is None:
            return None
        total += peak
    return total


def peak_of(name: str, kind: Arithmetic) -> float | None:
    """Return the peak FLOP/s of a GPU by its name; None if it is unknown."""
    found = next((peaks for key, peaks in PEAKS.items() if key in name), dict[Arithmetic, float]())
    peak = found.get(
        kind, found.get(Arithmetic.FLOAT32) if kind is Arithmetic.TF32 else None
    )  # GPUs before Ampere have no TF32
    return peak * TERA if peak else None


def _places(crop: int, pooling: str) -> dict[str, int]:
    """Return the number of output positions of each convolution."""
    kernel, stride, _ = KERNELS["conv1"]
    conv1 = (crop + CONV1_PADDING[1] - kernel) // stride + 1
    conv2 = (conv1 - POOLING_SIDES[pooling]) // 2 + 1
    upper = (conv2 - POOLING_SIDES[pooling]) // 2 + 1
    return {"conv1": conv1**2, "conv2": conv2**2} | dict.fromkeys(("conv3", "conv4", "conv5"), upper**2)
