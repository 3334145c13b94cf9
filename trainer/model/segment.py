"""Segments of a tower between two exchanges, each compiled or recorded as a CUDA graph on its own.

Towers exchange maps only between segments, so the same segments serve towers on one device, on two, and in two processes.

The fast form serves training batches of the largest size seen. Validation, predictions and an epoch's short last batch
take the plain form, so that none of them costs another compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from trainer.model.speed import Speed


class TowerSegment:
    """One segment of one tower.

    Args:
        run: function of the segment; its arguments are tensors on ``device``, the first of them the batch.
        layers: layers whose parameters ``run`` uses.
        speed: execution options.
        device: device of the tower.
    """

    def __init__(self, run: Callable[..., Tensor], layers: list[nn.Module], speed: Speed, device: torch.device) -> None:
        self._layers, self._speed, self._device = layers, speed, device
        self._plain = self._narrow(run)
        self._fast = self._narrow(torch.compile(run, dynamic=False)) if speed.compile else self._plain
        self._graph: Callable[..., Tensor] | None = None
        self._size = 0

    def __call__(self, *given: Tensor) -> Tensor:
        """Compute the segment."""
        if not torch.is_grad_enabled():
            return self._plain(*given)  # validation and prediction
        size = len(given[0])
        if size > self._size:  # graphs have fixed shapes, so a larger batch needs a new one
            self._size, self._graph = size, self._record(given) if self._speed.cuda_graphs else None
        if size < self._size:  # an epoch's short last batch
            return self._plain(*given)
        with self._here():
            return (self._graph or self._fast)(*given)

    def _narrow(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if self._speed.amp == "off":
            return run

        def narrow(*given: Tensor) -> Tensor:
            # No cache: a segment uses each weight once, and a graph must not refer to a cast made outside of it.
            with torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False):
                return run(*given)

        return narrow

    def _record(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """Return the segment as two CUDA graphs, forward and backward, for inputs of the shapes of ``given``."""
        # Graphs read from fixed addresses: torch records with these tensors and copies each batch into them.
        like = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given)
        with self._here():
            graph = torch.cuda.make_graphed_callables(_Callable(self._fast, self._layers), like)
        return cast("Callable[..., Tensor]", graph)

    def _here(self) -> AbstractContextManager[object]:
        """Make the tower's device current: graphs are recorded and replayed on torch's current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


class _Callable(nn.Module):
    """A segment as a module with its parameters, the form in which torch records graphs."""

    def __init__(self, run: Callable[..., Tensor], layers: list[nn.Module]) -> None:
        super().__init__()
        self._run = run
        self.layers = nn.ModuleList(layers)

    def forward(self, *given: Tensor) -> Tensor:
        return self._run(*given)
