"""AlexNet in two towers (paper section 3.5, figure 2).

Each tower has half of the kernels of every layer. Towers exchange outputs at the crosses and nowhere else::

    images ─┬─ conv1 LRN pool conv2 LRN pool ─╳─ conv3 conv4 conv5 pool ─╳─ fc6 ─╳─ fc7 ─╲
            └─ conv1 LRN pool conv2 LRN pool ─╳─ conv3 conv4 conv5 pool ─╳─ fc6 ─╳─ fc7 ──╳─ fc8 (on tower 0) ─ logits

Maps at width 1, of both towers: 55x55x96, 27x27x256, 13x13x384, 13x13x384, 13x13x256; after pooling, sides 27, 13 and 6.
Shapes in comments are of one tower, for crops of 224: B images, C1 to C5 kernels of a tower.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ConfigError
from trainer.model.ablation import Ablation
from trainer.model.dropout import dropout_mask, halve
from trainer.model.fused import relu_lrn_pool
from trainer.model.lrn import local_response_norm
from trainer.model.presets import Preset, preset_named
from trainer.model.rng import DropoutKey, normal_weights
from trainer.model.segment import TowerSegment
from trainer.model.speed import REFERENCE, Speed, check_speed
from trainer.parallel.exchange import Share, choose_exchange

_T = TypeVar("_T")

IMAGE_SIDE_PX: Final = 224
"""Side of the input (paper section 4.1)."""

WEIGHT_STD: Final = 0.01
"""Initial standard deviation of all weights (paper section 5), except the preset's ``middle_std``."""

BIASES_OF_ONE: Final = frozenset({"conv2", "conv4", "conv5", "fc6", "fc7"})
"""Layers whose biases start at 1, which gives the ReLUs positive inputs early (paper section 5). All others, fc8's too,
start at 0, as do all biases with tanh."""

LAYER_NUMBERS: Final = {
    name: n for n, name in enumerate(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), 1)
}
"""Layer number in the addresses of random words; it does not change if other layers are left out."""

KERNELS: Final = {"conv1": (11, 4, 0), "conv2": (5, 1, 2), "conv3": (3, 1, 1), "conv4": (3, 1, 1), "conv5": (3, 1, 1)}
"""Kernel side, stride and padding of each convolution (paper section 3.5)."""

CONV1_PADDING: Final = (0, 3, 0, 3)
"""Zeros at the left, right, top and bottom of the input. The paper's 55x55 maps need 227 = 4 * 54 + 11 pixels; the authors'
code adds the missing 3 at the right and bottom only."""

POOLING_SIDES: Final = {"overlapping": 3, "plain": 2}
"""Side of the pooling windows, at stride 2 (paper section 3.4)."""


def pooled_side(crop: int, pooling: str) -> int:
    """Return the side of conv5's maps after pooling: 6 for crops of 224, below 1 if the crop is too small.

    conv1 and the three poolings shrink the maps; conv2 to conv5 keep their side.
    """
    kernel, stride, _ = KERNELS["conv1"]
    side = (crop + CONV1_PADDING[1] - kernel) // stride + 1
    for _ in range(3):  # after conv1, conv2 and conv5
        side = (side - POOLING_SIDES[pooling]) // 2 + 1
    return side


@dataclass(frozen=True)
class Sizes:
    """The numbers of kernels and units of each tower.

    Fields:
        towers: 1 or 2.
        kernels: kernels of conv1 to conv5, per tower.
        units: units of fc6 and fc7, per tower.
        without: layers that are left out.
        pooled: side of conv5's maps after pooling, in pixels.
    """

    towers: int
    kernels: tuple[int, int, int, int, int]
    units: tuple[int, int]
    without: tuple[str, ...] = ()
    pooled: int = pooled_side(IMAGE_SIDE_PX, "overlapping")

    @classmethod
    def of(
        cls,
        towers: int,
        width: float,
        without: tuple[str, ...] = (),
        crop: int = IMAGE_SIDE_PX,
        pooling: str = "overlapping",
    ) -> Sizes:
        """Return the sizes of the paper's network (two towers) or of its smaller one (section 3.2), scaled by ``width``."""
        if towers not in (1, 2):
            raise ConfigError("--towers", towers, "1 or 2")
        if not (math.isfinite(width) and 0 < width <= 4):
            raise ConfigError("--width", width, "a number above 0, at most 4")
        if (pooled := pooled_side(crop, pooling)) < 1:
            smallest = next(side for side in itertools.count(crop) if pooled_side(side, pooling) == 1)
            raise ConfigError(
                "--crop", crop, f"at least {smallest} pixels, or nothing is left after the last {pooling} pooling"
            )
        # One tower has half the kernels of conv1 to conv4, but the full conv5 and fully connected layers (section 3.2).
        conv5, hidden = (128, 2048) if towers == 2 else (256, 4096)
        c1, c2, c3, c4, c5, f6, f7 = (max(1, round(n * width)) for n in (48, 128, 192, 192, conv5, hidden, hidden))
        return cls(towers, (c1, c2, c3, c4, c5), (f6, f7), without, pooled)

    def counts(self) -> dict[str, int]:
        """Return the kernels or units of each layer in one tower, in the order of the layers, without fc8."""
        names = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
        return {
            name: count
            for name, count in zip(names, self.kernels + self.units, strict=True)
            if name not in self.without
        }

    def fan_ins(self) -> dict[str, int]:
        """Return the inputs of one unit of each layer, in the order of the layers, with fc8."""
        counts = self.counts()
        fan_ins = {"conv1": 3 * 11 * 11}  # R, G, B times the kernel
        channels = counts["conv1"]
        if "conv2" in counts:
            fan_ins["conv2"], channels = channels * 5 * 5, counts["conv2"]
        channels *= self.towers  # from here on a layer may read both towers
        for name in ("conv3", "conv4", "conv5"):
            if name in counts:
                fan_ins[name], channels = channels * 3 * 3, counts[name]
        units = self.towers * channels * self.pooled**2
        for name in ("fc6", "fc7"):
            if name in counts:
                fan_ins[name], units = units, self.towers * counts[name]
        return fan_ins | {"fc8": units}


class Tower(nn.Module):
    """One tower of the network, the part of one GPU in the paper."""

    def __init__(self, sizes: Sizes, preset: Preset, ablation: Ablation, index: int, fused: bool = False) -> None:
        super().__init__()
        self.index, self._preset, self._ablation = index, preset, ablation
        self._fused = fused and ablation.lrn and ablation.activation == "relu"  # the fused kernel has no other form
        self._activate = torch.tanh if ablation.activation == "tanh" else functional.relu
        count, fan_in = sizes.counts(), sizes.fan_ins()
        for name in count:
            side, stride, padding = KERNELS.get(name, (0, 1, 0))
            layer: nn.Module
            if side:
                # Weights (kernels, channels, side, side).
                layer = nn.Conv2d(fan_in[name] // side**2, count[name], side, stride=stride, padding=padding)
            else:
                layer = nn.Linear(fan_in[name], count[name])  # weights (units, inputs)
            self.add_module(name, layer)

    def lower(self, images: Tensor) -> Tensor:
        """Compute conv1 and conv2: (B, 3, crop, crop) -> (B, C2, S, S), S = 13 for crops of 224."""
        maps = self._layers["conv1"](functional.pad(images, CONV1_PADDING))  # (B, C1, 55, 55)
        maps = self._shrink(maps, self._preset.relu_before_lrn1)  # (B, C1, 27, 27)
        if "conv2" not in self._layers:
            return self._pool(maps)  # (B, C1, 13, 13)
        return self._shrink(self._layers["conv2"](maps))  # (B, C2, 27, 27) -> (B, C2, 13, 13)

    def upper(self, whole: Tensor) -> Tensor:
        """Compute conv3 to conv5: (B, towers * C2, 13, 13) -> (B, C5 * 6 * 6), in the order (kernel, row, column)."""
        maps = whole
        for name in ("conv3", "conv4", "conv5"):
            if name in self._layers:
                maps = self._activate(self._layers[name](maps))  # (B, C3, 13, 13), then C4 and C5
        return self._pool(maps).flatten(1)  # (B, C5, 6, 6) -> (B, C5 * 36)

    def hidden(self, name: str, whole: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute fc6 or fc7 with dropout.

        Args:
            name: ``fc6`` or ``fc7``.
            whole: (B, inputs), outputs of both towers.
            mask: (B, units) bool, True for kept units; None at test time and without dropout.

        Returns:
            (B, units).
        """
        units: Tensor = self._activate(self._layers[name](whole))
        if mask is not None:
            return units * mask
        return halve(units) if self._ablation.dropout and not self.training else units

    def mask(self, name: str, batch: int, key: DropoutKey | None) -> Tensor | None:
        """Draw the dropout mask of fc6 or fc7, (B, units) bool on this tower's device; None if nothing is dropped."""
        if not (self.training and self._ablation.dropout):
            return None
        bias = cast("Tensor", self._layers[name].bias)
        return dropout_mask((batch, len(bias)), key, self.index, LAYER_NUMBERS[name], bias.device)

    @property
    def _layers(self) -> dict[str, nn.Module]:
        return cast("dict[str, nn.Module]", self._modules)

    def _shrink(self, maps: Tensor, activate_first: bool = True) -> Tensor:
        """Apply activation, LRN and pooling after conv1 or conv2 (paper sections 3.3 to 3.5)."""
        if self._fused:
            return relu_lrn_pool(maps, self._preset.lrn_alpha, POOLING_SIDES[self._ablation.pooling], activate_first)
        if activate_first:
            return self._pool(self._normalise(self._activate(maps)))
        return self._activate(self._pool(self._normalise(maps)))

    def _normalise(self, maps: Tensor) -> Tensor:
        return local_response_norm(maps, self._preset.lrn_alpha) if self._ablation.lrn else maps

    def _pool(self, maps: Tensor) -> Tensor:
        """Apply max pooling at stride 2 (paper section 3.4); for crops of 224, windows of 3 and of 2 give equal sides."""
        return functional.max_pool2d(maps, POOLING_SIDES[self._ablation.pooling], 2)


class AlexNet(nn.Module):
    """The network of the paper, with initial weights.

    Args:
        num_classes: number of logits.
        width: factor of the numbers of kernels and units; 1 is the paper's. The std of narrower layers grows by
            sqrt(full fan-in / fan-in), full at width 1 with the same crop, which preserves the signal; otherwise narrow
            networks do not start to learn. At width 1 and above the std is the preset's, whatever the crop.
        preset: ``paper`` (its text) or ``original`` (the authors' code); see ``trainer.model.presets``.
        devices: devices of the towers: one for all, or one for each.
        towers: 2, or 1 for the paper's smaller network.
        seed: seed of the weights. Equal seeds give equal weights on any devices.
        ablation: differences from the paper's network; None for none.
        share: towers in this process, and their exchange with others, if the network is distributed over processes;
            None puts all towers here. With a share, ``devices`` is this process's single device.
        crop: side of the input, in pixels; 224 in the paper.
        speed: execution options.

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
        ablation: Ablation | None = None,
        share: Share | None = None,
        crop: int = IMAGE_SIDE_PX,
        speed: Speed = REFERENCE,
    ) -> None:
        super().__init__()
        self.preset, self.ablation = preset_named(preset), ablation or Ablation()
        self.sizes = Sizes.of(towers, width, self.ablation.without, crop, self.ablation.pooling)
        self.devices = tuple(torch.device(device) for device in devices)
        if len(self.devices) not in (1, towers):
            raise ConfigError(
                "--devices", ",".join(map(str, devices)), f"one device, or one for each of {towers} towers"
            )
        check_speed(speed, self.devices)
        self.speed = speed = speed.on(self.devices)
        self._local_towers = share.towers if share else tuple(range(towers))
        self.exchange = share.exchange if share else choose_exchange(self.devices)
        self.fc8: nn.Linear | None = None
        with torch.device("meta"):  # skips torch's own initialisation, which _initialise would overwrite
            self.towers = nn.ModuleDict(
                {
                    str(index): Tower(self.sizes, self.preset, self.ablation, index, speed.fused_norm)
                    for index in self._local_towers
                }
            )
            if 0 in self._local_towers:
                self.fc8 = nn.Linear(self.sizes.fan_ins()["fc8"], num_classes)
        for tower, device in zip(self.each_tower, self._each(self.devices), strict=True):
            tower.to_empty(device=device)
        if self.fc8 is not None:
            self.fc8.to_empty(device=self.devices[0])
        self._layout = torch.channels_last if speed.channels_last else torch.contiguous_format
        self.to(memory_format=self._layout)  # type: ignore[call-overload]
        full = Sizes.of(towers, 1.0, self.ablation.without, crop, self.ablation.pooling)
        self._initialise(full, seed)  # before graphs may record the weights
        self._segments = [
            _segments(tower, speed, device)
            for tower, device in zip(self.each_tower, self._each(self.devices), strict=True)
        ]
        if self.fc8 is not None:
            self._head = TowerSegment(self.fc8, [self.fc8], speed, self.devices[0])

    def owns(self, name: str) -> bool:
        """Return True unless a parameter of that name belongs to another process; unknown names count as this one's."""
        owner, _, rest = name.partition(".")
        elsewhere = {str(index) for index in range(self.sizes.towers)} - set(self.towers)
        return rest.partition(".")[0] not in elsewhere if owner == "towers" else owner != "fc8" or self.fc8 is not None

    def dropout_units(self) -> dict[tuple[int, int], int]:
        """Return the units that dropout applies to, by (tower, layer), in all towers, also those of other processes."""
        counts = self.sizes.counts() if self.ablation.dropout else {}
        layers = [(LAYER_NUMBERS[name], counts[name]) for name in ("fc6", "fc7") if name in counts]
        return {(tower, layer): units for tower in range(self.sizes.towers) for layer, units in layers}

    @property
    def each_tower(self) -> list[Tower]:
        """Towers in this process, in order."""
        return cast("list[Tower]", list(self.towers.values()))

    def forward(self, images: Tensor | Sequence[Tensor], dropout: DropoutKey | None = None) -> Tensor:
        """Return the logits of a batch.

        Args:
            images: (B, 3, crop, crop) float32, 0 to 255 minus the mean, channels R, G, B; or one such tensor on each
                entry of ``devices``. Channels-last is fastest.
            dropout: key of the dropout masks in training mode; None draws them from torch's own generator.

        Returns:
            (B, num_classes) float32 on the first device. A process without tower 0 gets a zero instead, (), whose
            backward pass is this process's part of the network's.
        """
        given = [images.to(device) for device in self.devices] if isinstance(images, Tensor) else images
        given = [image.contiguous(memory_format=self._layout) for image in given]  # no copy if it is so already
        everyone, exchange = range(self.sizes.towers), self.exchange
        # Everything below is lazy: the last exchange asks for its parts, and so on back to the images. Each tower's output
        # is thus sent before the other tower computes.
        parts = self._run([segments.lower for segments in self._segments], self._each(given))
        parts = self._run([segments.upper for segments in self._segments], exchange(parts, everyone))
        for name in ("fc6", "fc7"):
            if name not in self.ablation.without:
                parts = self._run_hidden(name, exchange(parts, everyone), len(given[0]), dropout)
        (whole,) = exchange(parts, (0,))  # (B, 4096): fc8 reads both towers
        return whole if self.fc8 is None else self._head(whole).float()  # the loss is float32, also under autocast

    def _run(self, segments: Sequence[TowerSegment], given: Iterable[Tensor]) -> Iterator[Tensor]:
        """Run one segment of each tower in this process, on demand."""
        for segment, each in zip(segments, given, strict=True):
            yield segment(each)

    def _run_hidden(
        self, name: str, wholes: Iterator[Tensor], batch: int, dropout: DropoutKey | None
    ) -> Iterator[Tensor]:
        """Run fc6 or fc7 of each tower in this process, on demand."""
        for tower, segments in zip(self.each_tower, self._segments, strict=True):
            mask = tower.mask(name, batch, dropout)  # drawn while the other tower's part is copied
            whole = next(wholes)
            yield segments.hidden[name](whole) if mask is None else segments.hidden[name](whole, mask)

    def _each(self, given: Sequence[_T]) -> Sequence[_T]:
        """Return one entry for each tower in this process, given one for all or one for each."""
        return given if len(given) == len(self._local_towers) else list(given) * len(self._local_towers)

    def _initialise(self, full: Sizes, seed: int) -> None:
        """Draw the weights from N(0, std) and set the biases (paper section 5)."""
        fan_in, full_fan_in = self.sizes.fan_ins(), full.fan_ins()
        owners: list[tuple[int, nn.Module]] = [(tower.index, tower) for tower in self.each_tower]
        for address, owner in [*owners, (self.sizes.towers, self)]:  # fc8 has the address of one tower more
            for name in fan_in:
                layer = getattr(owner, name, None)
                if layer is None:
                    continue  # towers have no fc8, and the network itself has nothing else
                std = self.preset.middle_std if name in {"conv3", "conv4", "conv5"} else WEIGHT_STD
                std *= max(1.0, math.sqrt(full_fan_in[name] / fan_in[name]))
                # Drawn in float32 on the host, so that every device and layout gets the same weights.
                normal = normal_weights(seed, address, LAYER_NUMBERS[name], tuple(layer.weight.shape))
                layer.weight.data.copy_(torch.from_numpy(normal) * std)
                starts_at_one = name in BIASES_OF_ONE and self.ablation.activation == "relu"
                layer.bias.data.fill_(1.0 if starts_at_one else 0.0)


@dataclass(frozen=True)
class _TowerSegments:
    """The segments of a tower between two exchanges: conv1 and conv2; conv3 to conv5; fc6 and fc7 by name, if present."""

    lower: TowerSegment
    upper: TowerSegment
    hidden: dict[str, TowerSegment]


def _segments(tower: Tower, speed: Speed, device: torch.device) -> _TowerSegments:
    """Return the segments of a tower, compiled or recorded as ``speed`` says."""
    layers = dict(tower.named_children())

    def segment(run: Callable[..., Tensor], *names: str) -> TowerSegment:
        return TowerSegment(run, [layers[name] for name in names if name in layers], speed, device)

    return _TowerSegments(
        lower=segment(tower.lower, "conv1", "conv2"),
        upper=segment(tower.upper, "conv3", "conv4", "conv5"),
        hidden={name: segment(partial(tower.hidden, name), name) for name in ("fc6", "fc7") if name in layers},
    )
