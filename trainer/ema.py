"""An exponential moving average of a network's weights, for evaluation beside the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average of the weights over the steps, ``a <- d a + (1 - d) w`` after each step.

    d is ``decay``, and less in the first steps, (1 + step) / (10 + step), so that the initial weights soon count little.

    Args:
        model: network; its parameters may lie on several devices. The average starts at its weights.
        decay: d, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._parameters = list(weights.values())  # without gradients, in the parameters' own memory
        self._average = {name: parameter.clone() for name, parameter in weights.items()}
        self._decay = decay

    def update(self, step: int) -> None:
        """Take in the weights after update number ``step``, from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), self._parameters, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return the average by parameter name, each of its parameter's shape and device; later updates change it."""
        return dict(self._average)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore the result of ``weights``; names of another process's tower are left out."""
        for name, tensor in average.items():
            if name in self._average:
                self._average[name].copy_(tensor)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the average in place of the network's weights, and those back afterwards, bit for bit.

        Parameters keep their memory, which CUDA graphs have recorded.
        """
        own = [parameter.clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, list(self._average.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, own)
