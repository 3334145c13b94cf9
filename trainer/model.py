"""AlexNet in two towers (paper section 3.5, figure 2).

Each tower has half of the kernels of every layer; towers meet in ``exchange`` and nowhere else::

    images ─┬─ conv1 LRN pool conv2 LRN pool ─╳─ conv3 conv4 conv5 pool ─╳─ fc6 ─╳─ fc7 ─╲
            └─ conv1 LRN pool conv2 LRN pool ─╳─ conv3 conv4 conv5 pool ─╳─ fc6 ─╳─ fc7 ──╳─ fc8 (on tower 0) ─ logits

Maps at width 1, of all towers: 55x55x96, 27x27x256, 13x13x384, 13x13x384, 13x13x256; pooled 27, 13 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.chance import DropoutKey, normal_weights
from trainer.dropout import drop_half, halve
from trainer.errors import ConfigError
from trainer.exchange import choose_exchange
from trainer.lrn import local_response_norm
from trainer.preset import Preset, preset_named

_T = TypeVar("_T")

IMAGE_SIDE_PX: Final = 224

WEIGHT_STD: Final = 0.01
"""Of every weight at the start (paper section 5), but for the preset's ``middle_std``."""

BIASES_OF_ONE: Final = frozenset({"conv2", "conv4", "conv5", "fc6", "fc7"})
"""These biases start at 1, so that ReLUs see positive inputs early (paper section 5); the others, fc8's too, at 0."""

_POOLED_SIDE: Final = 6
_CONV1_ZEROS: Final = (0, 3, 0, 3)
"""Columns at the right and rows at the bottom: 224 + 3 gives 55 places for kernels of 11 at stride 4."""


@dataclass(frozen=True)
class Sizes:
    """How many kernels and units each tower has.

    Fields:
        towers: 1 or 2.
        kernels: of conv1 to conv5, per tower.
        units: of fc6 and fc7, per tower.
    """

    towers: int
    kernels: tuple[int, int, int, int, int]
    units: tuple[int, int]

    @classmethod
    def of(cls, towers: int, width: float) -> Sizes:
        """The paper's net (two towers), or its smaller one of section 3.2: half the kernels, but the last ones whole."""
        if towers not in (1, 2):
            raise ConfigError("--towers", towers, "1 or 2")
        if not (math.isfinite(width) and 0 < width <= 4):
            raise ConfigError("--width", width, "a number above 0, at most 4")
        conv5, hidden = (128, 2048) if towers == 2 else (256, 4096)
        c1, c2, c3, c4, c5, f6, f7 = (max(1, round(n * width)) for n in (48, 128, 192, 192, conv5, hidden, hidden))
        return cls(towers, (c1, c2, c3, c4, c5), (f6, f7))

    def fan_ins(self) -> dict[str, int]:
        """How many inputs one unit of each layer has, in the order of the layers."""
        c1, c2, c3, c4, c5 = self.kernels
        f6, f7 = self.units
        return {
            "conv1": 3 * 11 * 11,
            "conv2": c1 * 5 * 5,
            "conv3": self.towers * c2 * 3 * 3,
            "conv4": c3 * 3 * 3,
            "conv5": c4 * 3 * 3,
            "fc6": self.towers * c5 * _POOLED_SIDE**2,
            "fc7": self.towers * f6,
            "fc8": self.towers * f7,
        }


class Tower(nn.Module):
    """One GPU's share of the network."""

    def __init__(self, sizes: Sizes, preset: Preset, index: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = sizes.kernels
        f6, f7 = sizes.units
        fan_in = sizes.fan_ins()
        self.index, self._preset = index, preset
        self.conv1 = nn.Conv2d(3, c1, 11, stride=4)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2)
        self.conv3 = nn.Conv2d(sizes.towers * c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1)
        self.fc6 = nn.Linear(fan_in["fc6"], f6)
        self.fc7 = nn.Linear(fan_in["fc7"], f7)

    def lower(self, images: Tensor) -> Tensor:
        """conv1 and conv2: (B, 3, 224, 224) -> (B, C2, 13, 13)."""
        maps = self.conv1(functional.pad(images, _CONV1_ZEROS))  # (B, C1, 55, 55)
        if self._preset.relu_before_lrn1:
            maps = _pool(self._normalise(functional.relu(maps)))
        else:
            maps = functional.relu(_pool(self._normalise(maps)))
        maps = functional.relu(self.conv2(maps))  # (B, C2, 27, 27)
        return _pool(self._normalise(maps))

    def upper(self, whole: Tensor) -> Tensor:
        """conv3 to conv5: (B, towers * C2, 13, 13) -> (B, C5 * 36), in the order (kernel, row, column)."""
        maps = functional.relu(self.conv3(whole))
        maps = functional.relu(self.conv4(maps))
        maps = functional.relu(self.conv5(maps))
        return _pool(maps).flatten(1)

    def hidden6(self, whole: Tensor, dropout: DropoutKey | None) -> Tensor:
        """fc6: (B, towers * C5 * 36) -> (B, F6)."""
        return self._hidden(self.fc6, whole, dropout, 6)

    def hidden7(self, whole: Tensor, dropout: DropoutKey | None) -> Tensor:
        """fc7: (B, towers * F6) -> (B, F7)."""
        return self._hidden(self.fc7, whole, dropout, 7)

    def _hidden(self, layer: nn.Module, whole: Tensor, dropout: DropoutKey | None, number: int) -> Tensor:
        units = functional.relu(layer(whole))
        return drop_half(units, dropout, self.index, number) if self.training else halve(units)

    def _normalise(self, maps: Tensor) -> Tensor:
        return local_response_norm(maps, self._preset.lrn_alpha)


class AlexNet(nn.Module):
    """The network of the paper, ready to train: its weights are drawn when it is made.

    Args:
        num_classes: how many logits.
        width: factor of the numbers of kernels and units; 1 is the paper's. Narrower nets get wider weights, by
            sqrt(full fan-in / fan-in), which keeps the signal as strong; without it they do not start to learn.
        preset: ``paper`` (its text) or ``original`` (its authors' code); see ``trainer.preset``.
        devices: where the towers live: one device for all, or one for each.
        towers: 2, or 1 for the paper's smaller net.
        seed: of the weights. Equal seeds give equal weights on any devices.

    At width 1 with 1,000 classes it has 60,965,224 parameters; with one tower 59,798,312.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        preset: str = "paper",
        devices: Sequence[str | torch.device] = ("cpu",),
        towers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.preset = preset_named(preset)
        self.sizes = Sizes.of(towers, width)
        self.devices = tuple(torch.device(device) for device in devices)
        if len(self.devices) not in (1, towers):
            raise ConfigError(
                "--devices", ",".join(map(str, devices)), f"one device, or one for each of {towers} towers"
            )
        self._everyone = range(towers)
        self.exchange = choose_exchange(self.devices)
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            self.towers = nn.ModuleList(Tower(self.sizes, self.preset, index) for index in self._everyone)
            self.fc8 = nn.Linear(self.sizes.fan_ins()["fc8"], num_classes)
        for tower, device in zip(self.each_tower, self._each(self.devices), strict=True):
            tower.to_empty(device=device)
        self.fc8.to_empty(device=self.devices[0])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._initialise(Sizes.of(towers, 1.0), seed)

    @property
    def each_tower(self) -> list[Tower]:
        """The towers, in order."""
        return cast("list[Tower]", list(self.towers))

    def forward(self, images: Tensor | Sequence[Tensor], dropout: DropoutKey | None = None) -> Tensor:
        """The logits of a batch.

        Args:
            images: (B, 3, 224, 224) float32, 0 to 255 minus the mean, channels R, G, B; or one such tensor for each
                entry of ``devices``, already there. Channels-last is fastest.
            dropout: which masks to draw in training mode; None takes them from torch's own generator.

        Returns:
            (B, num_classes) float32 on the first device.
        """
        given = [images.to(device) for device in self.devices] if isinstance(images, Tensor) else images
        towers, everyone, exchange = self.each_tower, self._everyone, self.exchange
        parts = [tower.lower(x) for tower, x in zip(towers, self._each(given), strict=True)]
        parts = [tower.upper(x) for tower, x in zip(towers, exchange(parts, everyone), strict=True)]
        parts = [tower.hidden6(x, dropout) for tower, x in zip(towers, exchange(parts, everyone), strict=True)]
        parts = [tower.hidden7(x, dropout) for tower, x in zip(towers, exchange(parts, everyone), strict=True)]
        logits: Tensor = self.fc8(*exchange(parts, (0,)))
        return logits

    def _each(self, given: Sequence[_T]) -> Sequence[_T]:
        """One entry for each tower, from one for all or one for each."""
        return given if len(given) == self.sizes.towers else list(given) * self.sizes.towers

    def _initialise(self, full: Sizes, seed: int) -> None:
        fan_in, full_fan_in = self.sizes.fan_ins(), full.fan_ins()
        for tower, owner in enumerate([*self.each_tower, self]):
            for number, name in enumerate(fan_in, start=1):
                layer = getattr(owner, name, None)
                if layer is None:
                    continue  # fc8 is the whole net's, the other layers are the towers'
                std = self.preset.middle_std if name in {"conv3", "conv4", "conv5"} else WEIGHT_STD
                std *= math.sqrt(full_fan_in[name] / fan_in[name])
                layer.weight.data.copy_(torch.from_numpy(normal_weights(seed, tower, number, layer.weight.shape)) * std)
                layer.bias.data.fill_(1.0 if name in BIASES_OF_ONE else 0.0)


def _pool(maps: Tensor) -> Tensor:
    """Overlapping pooling (paper section 3.4): windows of 3, two apart."""
    return functional.max_pool2d(maps, 3, 2)
