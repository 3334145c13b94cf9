"""How much of a device's arithmetic a training uses: its model FLOP utilisation (MFU).

Arithmetic of the model alone counts, not what an implementation does besides: two operations for each multiply-add of a
convolution or a fully connected layer, forward once and backward twice (for its inputs and its weights; conv1 needs no
gradient of its inputs). At width 1 these are 4.136 GFLOP an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from trainer.model.alexnet import CONV1_PADDING, KERNELS, POOLING_SIDES, Sizes

TERA: Final = 1e12

PEAKS: Final[dict[str, dict[str, float]]] = {
    "H200": {"bfloat16": 989, "float16": 989, "tf32": 495, "float32": 67},
    "H100 PCIe": {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51},
    "H100": {"bfloat16": 989, "float16": 989, "tf32": 495, "float32": 67},
    "A100": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "A10G": {"bfloat16": 70, "float16": 70, "tf32": 35, "float32": 35},
    "L40S": {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6},
    "L4": {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3},
    "V100": {"float16": 125, "float32": 15.7},
    "T4": {"float16": 65, "float32": 8.1},
    "RTX 4090": {"bfloat16": 165, "float16": 165, "tf32": 82.6, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71, "float16": 71, "tf32": 35.6, "float32": 35.6},
}
"""TFLOP/s of dense arithmetic with float32 sums, by the makers' data sheets, for the first key that a device's name
has in it. Sparse figures are twice as high, and nobody reaches them here."""


def multiply_adds(sizes: Sizes, num_classes: int, crop: int, pooling: str) -> dict[str, int]:
    """Of one image's forward pass, by layer, over all towers.

    Args:
        sizes: of the layers.
        num_classes: how many logits.
        crop: side of the images, in pixels.
        pooling: ``overlapping`` or ``plain``.
    """
    counts, fan_ins, places = sizes.counts(), sizes.fan_ins(), _places(crop, pooling)
    layers = {name: sizes.towers * counts[name] * fan_ins[name] * places.get(name, 1) for name in counts}
    return layers | {"fc8": num_classes * fan_ins["fc8"]}


def training_flops(sizes: Sizes, num_classes: int, crop: int, pooling: str) -> int:
    """Of one image, forward and backward, over all towers; arguments as in ``multiply_adds``."""
    layers = multiply_adds(sizes, num_classes, crop, pooling)
    return 2 * (3 * sum(layers.values()) - layers["conv1"])


def peak_flops(devices: Sequence[torch.device], dtype: torch.dtype) -> float | None:
    """What ``devices`` can do together per second in ``dtype``; None if one of them is not in the table.

    float32 counts as TF32 where torch may use that, for a share of a peak that is not in use would flatter.
    """
    kind = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        kind = "tf32"
    total = 0.0
    for device in dict.fromkeys(devices):
        if device.type != "cuda":
            return None
        peak = peak_of(torch.cuda.get_device_name(device), kind)
        if peak is None:
            return None
        total += peak
    return total


def peak_of(name: str, kind: str) -> float | None:
    """FLOP/s of a GPU by its name, in ``bfloat16``, ``float16``, ``tf32`` or ``float32``; None if it is not known."""
    found = next((peaks for key, peaks in PEAKS.items() if key in name), {})
    peak = found.get(kind, found.get("float32") if kind == "tf32" else None)  # before Ampere there was no TF32
    return peak * TERA if peak else None


def _places(crop: int, pooling: str) -> dict[str, int]:
    """At how many places of an image each convolution's kernels are."""
    kernel, stride, _ = KERNELS["conv1"]
    conv1 = (crop + CONV1_PADDING[1] - kernel) // stride + 1
    conv2 = (conv1 - POOLING_SIDES[pooling]) // 2 + 1
    upper = (conv2 - POOLING_SIDES[pooling]) // 2 + 1
    return {"conv1": conv1**2, "conv2": conv2**2} | dict.fromkeys(("conv3", "conv4", "conv5"), upper**2)
