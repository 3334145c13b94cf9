"""The arithmetic of the model, and the model FLOP utilisation (MFU) of a training.

Only the model's own arithmetic counts: two operations per multiply-add of convolutions and fully connected layers, once
forward and twice backward (for inputs and for weights; conv1 needs no gradient of its input). At width 1 this is
4.136 GFLOP per image.
"""

from __future__ import annotations

import re
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


def _peaks(bfloat16: float, tf32: float, float32: float) -> dict[Arithmetic, float]:
    """Return the peaks of a GPU whose tensor cores multiply float16 as fast as bfloat16."""
    return {
        Arithmetic.BFLOAT16: bfloat16,
        Arithmetic.FLOAT16: bfloat16,
        Arithmetic.TF32: tf32,
        Arithmetic.FLOAT32: float32,
    }


PEAKS: Final[dict[str, dict[Arithmetic, float]]] = {
    # "NVIDIA Blackwell Architecture", table of HGX B200 and GB200 per GPU: 4.5 and 5 PFLOP/s sparse in bfloat16.
    "B200": _peaks(2250, 1125, 75),
    "GB200": _peaks(2500, 1250, 80),
    # "NVIDIA H200 Tensor Core GPU Datasheet": SXM and NVL, sparse 1,979 and 1,671.
    "H200": _peaks(989, 495, 67),
    "H200 NVL": _peaks(835, 418, 60),
    "GH200": _peaks(989, 495, 67),  # "NVIDIA GH200 Grace Hopper Superchip Datasheet"
    # "NVIDIA H100 Tensor Core GPU Datasheet": SXM 1,979 sparse, NVL 1,671, PCIe 1,513.
    "H100": _peaks(989, 495, 67),
    "H100 NVL": _peaks(835, 418, 60),
    "H100 PCIe": _peaks(756, 378, 51),
    "H20": _peaks(148, 74, 44),  # no public data sheet; dense figures as the trade press reported them
    "A100": _peaks(312, 156, 19.5),  # "NVIDIA A100 Tensor Core GPU Datasheet": SXM and PCIe alike
    "A10": _peaks(125, 62.5, 31.2),  # "NVIDIA A10 Tensor Core GPU Datasheet"
    "A10G": _peaks(70, 35, 35),  # "NVIDIA A10G" data sheet, for Amazon's G5
    # "NVIDIA L40" and "L40S GPU Datasheet": 362 and 733 sparse. "NVIDIA L4 Tensor Core GPU Datasheet": 242 sparse.
    "L40": _peaks(181, 90.5, 90.5),
    "L40S": _peaks(362, 183, 91.6),
    "L4": _peaks(121, 60, 30.3),
    # "NVIDIA V100" and "T4 Tensor Core GPU Datasheet"; neither has bfloat16 or TF32.
    "V100": {Arithmetic.FLOAT16: 125, Arithmetic.FLOAT32: 15.7},
    "V100 PCIe": {Arithmetic.FLOAT16: 112, Arithmetic.FLOAT32: 14},
    "T4": {Arithmetic.FLOAT16: 65, Arithmetic.FLOAT32: 8.1},
    # "NVIDIA Ada" and "Ampere GA102 GPU Architecture", appendices: tensor cores with float32 accumulation.
    "RTX 4090": _peaks(165, 82.6, 82.6),
    "RTX 3090": _peaks(71, 35.6, 35.6),
}
"""TFLOP/s of dense arithmetic with float32 accumulation, from the vendors' documents. Their sparse figures are twice as high
and do not apply to a dense network. Keys are words of the names that torch reports: see ``peak_of``."""

_OTHER_MODELS: Final = frozenset({"D", "LAPTOP", "MAX", "MIG", "SUPER", "TI"})
"""Words of the names of slower or partial devices, such as a slice of an A100 ("... MIG 1g.5gb") or a laptop's GPU."""


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
    """Return the peak FLOP/s of a GPU by the name that torch reports; None if it is unknown.

    The longest key decides whose words stand in the name, in this order: "NVIDIA A100-SXM4-40GB" is an A100, but no A10, and
    "NVIDIA H100 NVL" is not the SXM model.
    """
    words = _words(name)
    if _OTHER_MODELS & set(words):
        return None
    keys = [key for key in PEAKS if _stands_in(_words(key), words)]
    if not keys:
        return None
    found = PEAKS[max(keys, key=len)]
    peak = found.get(
        kind, found.get(Arithmetic.FLOAT32) if kind is Arithmetic.TF32 else None
    )  # GPUs before Ampere have no TF32
    return peak * TERA if peak else None


def _words(name: str) -> list[str]:
    """Return the words of a name, in capitals; names separate them by spaces and hyphens."""
    return re.split(r"[\s-]+", name.upper())


def _stands_in(part: list[str], words: list[str]) -> bool:
    """Return True if ``part`` is in ``words``, in order; other words may stand between: "H100 80GB PCIe"."""
    rest = iter(words)
    return all(word in rest for word in part)


def _places(crop: int, pooling: str) -> dict[str, int]:
    """Return the number of output positions of each convolution."""
    kernel, stride, _ = KERNELS["conv1"]
    conv1 = (crop + CONV1_PADDING[1] - kernel) // stride + 1
    conv2 = (conv1 - POOLING_SIDES[pooling]) // 2 + 1
    upper = (conv2 - POOLING_SIDES[pooling]) // 2 + 1
    return {"conv1": conv1**2, "conv2": conv2**2} | dict.fromkeys(("conv3", "conv4", "conv5"), upper**2)
