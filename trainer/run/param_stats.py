"""Parameter statistics: mean |w|, mean |dw| and their ratio for each parameter, as in the authors' logs.

A ratio of about 1e-3 is usual. A ratio near 1 indicates a learning rate that is too high, one of 1e-6 a layer that does not
learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from trainer.model.alexnet import AlexNet
from trainer.optimizer import PaperSGD
from trainer.parallel.world import World


class ParamStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The statistics of one parameter.

    Fields:
        mean_w: mean magnitude of its values.
        mean_dw: mean magnitude of their last update.
    """

    mean_w: float
    mean_dw: float

    @property
    def ratio(self) -> float:
        """Ratio of the last update to the values."""
        return self.mean_dw / self.mean_w if self.mean_w else math.inf if self.mean_dw else 0.0

    @property
    def is_finite(self) -> bool:
        """True if all values and updates are finite: a NaN or infinity makes the mean one, too."""
        return math.isfinite(self.mean_w) and math.isfinite(self.mean_dw)


class ParamStatsRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="layers", tag_field="event"):
    """A log line with [mean |w|, mean |dw|, ratio] of each parameter after ``step``."""

    step: int
    parameters: dict[str, tuple[float, float, float]]

    @classmethod
    def of(cls, step: int, stats: Mapping[str, ParamStats]) -> ParamStatsRecord:
        """Return the log line for a result of ``measure``, in four significant digits."""
        rows = {name: (layer.mean_w, layer.mean_dw, layer.ratio) for name, layer in stats.items()}
        return cls(step, {name: (_short(row[0]), _short(row[1]), _short(row[2])) for name, row in rows.items()})


def measure(model: AlexNet, optimizer: PaperSGD, world: World) -> dict[str, ParamStats]:
    """Measure all parameters of the network, by name, tower by tower; all processes call this.

    It reads each weight and its momentum once, a fraction of the memory traffic of a step. It waits for the device once.
    """
    own = dict(model.named_parameters())
    decrements = optimizer.decrements()
    means = _means([*(parameter.detach() for parameter in own.values()), *(decrements[name] for name in own)])
    weights, steps = means[: len(own)], means[len(own) :]
    return {
        name: ParamStats(*row) for name, row in _everywhere(list(own), list(zip(weights, steps, strict=True)), world)
    }


def suspect(stats: Mapping[str, ParamStats], before: Mapping[str, ParamStats]) -> str | None:
    """Return the parameter to inspect after a divergence; None if nothing is known.

    It is the first parameter with a value that is not finite, unless all have one: damage spreads to all parameters within
    two steps. Otherwise it is the weight with the largest ratio, taken from ``before``, the statistics before the damage, if
    all are damaged now. Biases start at 0, so their ratios mean nothing.
    """
    bad = [name for name, layer in stats.items() if not layer.is_finite]
    if bad and len(bad) < len(stats):
        return bad[0]
    known = {name: layer.ratio for name, layer in (before if bad else stats).items() if name.endswith("weight")}
    return max(known, key=lambda name: known[name], default=None)


def _means(tensors: list[Tensor]) -> list[float]:
    """Return the mean magnitude of each tensor, with a few kernel launches per device and one transfer to the host."""
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    sums = [torch.stack(torch._foreach_norm([tensors[i] for i in own], 1)) for own in places.values()]  # of magnitudes
    first = next(iter(places))
    numbers = torch.cat([each.to(first, non_blocking=True) for each in sums]).tolist()  # the one wait
    total = dict(zip([i for own in places.values() for i in own], numbers, strict=True))
    return [total[i] / max(1, tensor.numel()) for i, tensor in enumerate(tensors)]


def _everywhere(
    names: list[str], rows: list[tuple[float, float]], world: World
) -> list[tuple[str, tuple[float, float]]]:
    """Return the rows of both towers' parameters, in every process.

    The towers' parameters have the same names except for the tower's number, so no names are sent. fc8 comes last and is
    tower 0's alone, so the rows of tower 1 are padded with zeros.
    """
    if world.pair is None:
        return list(zip(names, rows, strict=True))
    shared = [name for name in names if name.startswith("towers.")]
    numbers = [number for row in rows for number in row]
    length = 2 * (len(shared) + 2)  # two numbers for each parameter of a tower, and for fc8's weight and bias
    gathered = world.gather([*numbers, *[0.0] * (length - len(numbers))])
    tower_0, tower_1 = gathered[0], gathered[1]  # the first replica; all replicas have equal weights
    first = [name.replace("towers.1.", "towers.0.", 1) for name in shared]
    second = [name.replace("towers.0.", "towers.1.", 1) for name in first]
    pairs = [[(row[i], row[i + 1]) for i in range(0, length, 2)] for row in (tower_0, tower_1)]
    zero = list(zip([*first, "fc8.weight", "fc8.bias"], pairs[0], strict=True))
    one = list(zip(second, pairs[1], strict=False))
    return [*zero[: len(first)], *one, *zero[len(first) :]]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
