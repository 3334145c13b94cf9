"""ReLU, local response normalisation and max pooling as one operation (paper sections 3.1, 3.3 and 3.4).

As separate operations they read and write the largest maps of the network several times. The fused operation reads the
convolution's output, writes the pooled maps, and stores for each window which unit won; the backward pass recomputes the
rest. That also saves the memory of three or four tensors of the size of conv1's and conv2's maps.

On a GPU with Triton it is a kernel (``trainer.model.fused_triton``). Elsewhere it is made of PyTorch's operations, which
are no faster than the three but define the kernel's results. It is a registered operator, so ``torch.compile`` accepts it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.lrn import ALPHA, as_maps, as_rows, gradient_of_normalise, normalise

HAS_TRITON: Final = find_spec("triton") is not None
"""True with torch's CUDA builds, which bring Triton."""

if HAS_TRITON:
    from trainer.model import fused_triton

STRIDE: Final = 2
"""Stride of the pooling windows, overlapping or plain (paper section 3.4)."""


def relu_lrn_pool(maps: Tensor, alpha: float = ALPHA, side: int = 3, relu_first: bool = True) -> Tensor:
    """Apply ReLU, local response normalisation and max pooling.

    Args:
        maps: (B, C, H, W) floating point, output of a convolution; channels-last is fastest.
        alpha: weight of each square in LRN.
        side: side of the pooling windows, 2 or 3.
        relu_first: apply ReLU before LRN; False applies it after the pooling (preset ``original``, conv1).

    Returns:
        (B, C, (H - side) // 2 + 1, (W - side) // 2 + 1), with the dtype and memory format of ``maps``.
    """
    pooled: Tensor
    pooled, _ = _forward(maps, alpha, side, relu_first)
    return pooled


@torch.library.custom_op("trainer::relu_lrn_pool", mutates_args=())
def _forward(maps: Tensor, alpha: float, side: int, relu_first: bool) -> tuple[Tensor, Tensor]:
    """Return the pooled maps and, of the same shape, the winner's place in its window: row * side + column, uint8."""
    if HAS_TRITON and maps.is_cuda:
        return fused_triton.forward(maps, alpha, side, relu_first)
    rows = as_rows(functional.relu(maps) if relu_first else maps)
    normalised = as_maps(normalise(rows, alpha)[0], maps)
    pooled, flat = functional.max_pool2d(normalised, side, STRIDE, return_indices=True)
    top, left = (torch.arange(n, device=maps.device) * STRIDE for n in pooled.shape[2:])  # corners of the windows
    width = maps.shape[3]
    # max_pool2d numbers places in the whole map; a place in the window fits a byte.
    winners = (flat // width - top[:, None]) * side + (flat % width - left)
    return (pooled if relu_first else functional.relu(pooled)), winners.to(torch.uint8)


@_forward.register_fake
def _(maps: Tensor, alpha: float, side: int, relu_first: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001 -- its signature
    shape = [*maps.shape[:2], *((n - side) // STRIDE + 1 for n in maps.shape[2:])]
    pooled = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=_layout(maps))
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@torch.library.custom_op("trainer::relu_lrn_pool_backward", mutates_args=())
def _backward(gradient: Tensor, maps: Tensor, winners: Tensor, alpha: float, side: int, relu_first: bool) -> Tensor:
    """Return the gradient of ``maps``."""
    if HAS_TRITON and maps.is_cuda:
        return fused_triton.backward(gradient, maps, winners, alpha, side, relu_first)
    rows = as_rows(functional.relu(maps) if relu_first else maps)
    normalised, scale = normalise(rows, alpha)
    flat = _flat(winners, side, maps.shape[3])
    if not relu_first:  # a negative winner was set to 0 by ReLU
        won = as_maps(normalised, maps).flatten(2).gather(2, flat.flatten(2)).view_as(gradient)
        gradient = gradient * (won > 0)
    # Windows overlap, so a unit may win several times; its gradients are summed in float32 or wider.
    wide = torch.promote_types(maps.dtype, torch.float32)
    spread = torch.zeros(maps.shape, dtype=wide, device=maps.device).flatten(2)
    spread = spread.scatter_add_(2, flat.flatten(2), gradient.to(wide).flatten(2)).view(maps.shape)
    back = as_maps(gradient_of_normalise(as_rows(spread), rows, scale, alpha), maps)
    return back * (maps > 0) if relu_first else back


@_backward.register_fake
def _(gradient: Tensor, maps: Tensor, *how: Any) -> Tensor:  # noqa: ARG001 -- its signature
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device, memory_format=_layout(maps))


def _keep(ctx: Any, inputs: tuple[Tensor, float, int, bool], output: tuple[Tensor, Tensor]) -> None:
    maps, *ctx.how = inputs
    ctx.save_for_backward(maps, output[1])


def _derive(ctx: Any, gradient: Tensor, _of_winners: Tensor | None) -> tuple[Tensor, None, None, None]:
    maps, winners = ctx.saved_tensors
    return _backward(gradient, maps, winners, *ctx.how), None, None, None


_forward.register_autograd(_derive, setup_context=_keep)


def _flat(winners: Tensor, side: int, width: int) -> Tensor:
    """Return each winner's place in its map: row * width + column, int64, of the shape of ``winners``."""
    place = winners.long()
    top, left = (torch.arange(n, device=winners.device) * STRIDE for n in winners.shape[2:])
    return (top[:, None] + place // side) * width + left + place % side


def _layout(maps: Tensor) -> torch.memory_format:
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
