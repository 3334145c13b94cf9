"""What every parameter's values are like, layer by layer: the authors' logs had mean |w| and mean |dw| of each.

A ratio of about one to a thousand is usual; one near 1 tells that the learning rate is too high there, one of a millionth
that the layer does not learn.
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
    """A parameter at one moment.

    Fields:
        mean_w: mean of its values' magnitudes.
        mean_dw: the same of what the last step added to them.
    """

    mean_w: float
    mean_dw: float

    @property
    def ratio(self) -> float:
        """How large the last step was beside the values themselves."""
        return self.mean_dw / self.mean_w if self.mean_w else math.inf if self.mean_dw else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether every one of the values, and of their changes, is a number."""
        return math.isfinite(self.mean_w) and math.isfinite(self.mean_dw)


class ParamStatsRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="layers", tag_field="event"):
    """A line of the log: for each parameter [mean |w|, mean |dw|, their ratio] after ``step``."""

    step: int
    parameters: dict[str, tuple[float, float, float]]

    @classmethod
    def of(cls, step: int, stats: Mapping[str, ParamStats]) -> ParamStatsRecord:
        """The line for what ``measure`` gave; four digits tell enough."""
        rows = {name: (layer.mean_w, layer.mean_dw, layer.ratio) for name, layer in stats.items()}
        return cls(step, {name: (_short(row[0]), _short(row[1]), _short(row[2])) for name, row in rows.items()})


def measure(model: AlexNet, optimizer: PaperSGD, world: World) -> dict[str, ParamStats]:
    """Every parameter of the whole network, by name, in the order of the layers of each tower; all processes take part.

    It reads each weight and its momentum once: a fraction of a step's own traffic. Waits for the device.
    """
    own = dict(model.named_parameters())
    momentum, rates = optimizer.momentum(), optimizer.rates()
    weights = _means([parameter.detach() for parameter in own.values()])
    # The step before added -rate * buffer; see trainer.optimizer.
    buffers = _means([momentum[name] for name in own]) if momentum else [0.0] * len(own)
    steps = [rates[name] * mean for name, mean in zip(own, buffers, strict=True)]
    return {
        name: ParamStats(*row) for name, row in _everywhere(list(own), list(zip(weights, steps, strict=True)), world)
    }


def suspect(stats: Mapping[str, ParamStats], before: Mapping[str, ParamStats]) -> str | None:
    """The parameter to look at when a training has gone wrong; None if nothing is known.

    It is the first whose values are not all numbers, as long as others' are: damage spreads to all within a step or two.
    Else it is the one whose weights the last step changed most, for their size: ``before`` all was damaged, if it is.
    (Biases start at 0, so theirs tells nothing.)
    """
    bad = [name for name, layer in stats.items() if not layer.is_finite]
    if bad and len(bad) < len(stats):
        return bad[0]
    known = {name: layer.ratio for name, layer in (before if bad else stats).items() if name.endswith("weight")}
    return max(known, key=lambda name: known[name], default=None)


def _means(tensors: list[Tensor]) -> list[float]:
    """Mean magnitude of each; one launch for all on a device, and one wait."""
    norms = torch._foreach_norm(tensors, 1)
    return [norm.item() / max(1, tensor.numel()) for norm, tensor in zip(norms, tensors, strict=True)]


def _everywhere(
    names: list[str], rows: list[tuple[float, float]], world: World
) -> list[tuple[str, tuple[float, float]]]:
    """The rows of this process's parameters, and those of its twin's after them.

    Towers are alike but for their number, and fc8, which stands last, is tower 0's alone: so the rows of tower 1 are
    filled up with zeros, and every process knows all names.
    """
    if world.pair is None:
        return list(zip(names, rows, strict=True))
    shared = [name for name in names if name.startswith("towers.")]
    numbers = [number for row in rows for number in row]
    length = 2 * (len(shared) + 2)
    said = world.gather([*numbers, *[0.0] * (length - len(numbers))])
    tower, twin = said[0], said[1]  # all replicas have equal weights
    first = [name.replace("towers.1.", "towers.0.", 1) for name in shared]
    second = [name.replace("towers.0.", "towers.1.", 1) for name in first]
    pairs = [[(row[i], row[i + 1]) for i in range(0, length, 2)] for row in (tower, twin)]
    zero = list(zip([*first, "fc8.weight", "fc8.bias"], pairs[0], strict=True))
    one = list(zip(second, pairs[1], strict=False))
    return [*zero[: len(first)], *one, *zero[len(first) :]]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
