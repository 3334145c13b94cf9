"""Local response normalisation across adjacent maps (paper section 3.3), forward and backward.

b = a / (k + alpha * sum of a^2 over the n nearest maps)^beta; the window is cut off at the first and last map.

The sum over the window is a product with a band matrix of ones. On a CPU with channels-last tensors that is much faster
than ``torch.nn.LocalResponseNorm``, which also divides alpha by n and has another default of k.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SIZE: Final = 5
"""n, the number of adjacent maps with the map itself (paper section 3.3, as k, alpha and beta)."""

K: Final = 2.0

ALPHA: Final = 1e-4

BETA: Final = 0.75
"""Not a parameter: the code computes s^-3/4 from two square roots, at half the cost of a power."""


def local_response_norm(maps: Tensor, alpha: float = ALPHA) -> Tensor:
    """Normalise each unit by the squares at the same place of adjacent maps (paper section 3.3).

    Args:
        maps: (B, C, H, W) floating point; channels-last is fastest.
        alpha: weight of each square. The paper's text gives 1e-4; its authors' code divides that by n.

    Returns:
        A tensor like ``maps``: same shape, dtype and memory format.
    """
    normalised: Tensor = _LocalResponseNorm.apply(maps, alpha)  # type: ignore[no-untyped-call]
    return normalised


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]
    alpha: float


class _LocalResponseNorm(torch.autograd.Function):
    """LRN with a backward pass that saves two tensors, where autograd would save seven."""

    @staticmethod
    def forward(ctx: _Saved, maps: Tensor, alpha: float) -> Tensor:
        rows = as_rows(maps)  # (B H W, C)
        normalised, scale = normalise(rows, alpha)
        ctx.save_for_backward(rows, scale)
        ctx.alpha = alpha
        return as_maps(normalised, maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, gradient: Tensor) -> tuple[Tensor, None]:
        rows, scale = ctx.saved_tensors
        return as_maps(gradient_of_normalise(as_rows(gradient), rows, scale, ctx.alpha), gradient), None


def normalise(rows: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Apply the formula to the units of many places.

    Squares and sums are float32 or wider, also under autocast: bfloat16 has eight significant bits, in which alpha times a
    square would often vanish beside k.

    Args:
        rows: (P, C), the C maps at P places; any floating dtype.
        alpha: weight of each square.

    Returns:
        The normalised units, (P, C) like ``rows``; and s = k + alpha * (sum of squares), (P, C), float32 or wider.
    """
    with torch.autocast(rows.device.type, enabled=False):
        wide = _wide(rows)
        # One product with the band matrix instead of n shifted sums. K is filled in on the device: a copy of a number from
        # the host would wait for the device, and cannot be recorded as a CUDA graph.
        scale = torch.addmm(wide.new_full((), K), wide * wide, _band(wide), alpha=alpha)
        return (wide * _power(scale)).to(rows.dtype), scale


def gradient_of_normalise(gradient: Tensor, rows: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Return the gradient through ``normalise``.

    With p = s^-beta:  da_j = g_j p_j - 2 alpha beta a_j * sum over i near j of (g_i a_i p_i / s_i).

    Args:
        gradient: (P, C), gradient of the normalised units.
        rows: (P, C), input of ``normalise``.
        scale: (P, C), second output of ``normalise``.
        alpha: weight of each square.

    Returns:
        (P, C), gradient of ``rows``, in their dtype.
    """
    with torch.autocast(rows.device.type, enabled=False):
        wide = _wide(rows)
        direct = _wide(gradient) * _power(scale)
        # direct is g p, so (g p a / s) summed over the window is the inner sum of the formula.
        around = torch.mm((direct * wide).div_(scale), _band(wide))
        return direct.addcmul_(wide, around, value=-2 * alpha * BETA).to(rows.dtype)


def as_rows(maps: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as rows (B H W, C); channels-last maps need no copy."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (B H W, C) as maps (B, C, H, W) in the memory format of ``like``; channels-last needs no copy."""
    batch, channels, height, width = like.shape
    maps = rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return maps if like.is_contiguous(memory_format=torch.channels_last) else maps.contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _power(scale: Tensor) -> Tensor:
    """Return scale^-BETA, as s^-3/4 = s^-1/2 * (s^-1/2)^1/2."""
    root = scale.rsqrt()  # s is at least k = 2, so nothing can overflow
    return root.sqrt().mul_(root)


_BANDS: Final[dict[tuple[int, torch.dtype, torch.device], Tensor]] = {}
"""Band matrices by C, dtype and device: two for each device of a network, at most 64 KiB each at width 1."""


def _band(rows: Tensor) -> Tensor:
    """Return the band matrix (C, C) for ``rows``, made once for each C, dtype and device."""
    if torch.compiler.is_compiling():
        return _make_band(
            rows
        )  # a compiler makes it a part of its kernel, and must not keep its own kind of tensor here
    key = rows.shape[1], rows.dtype, rows.device
    if key not in _BANDS:
        with torch.inference_mode(False):  # a validation may need it first, and training then uses the same one
            _BANDS[key] = _make_band(rows)
    return _BANDS[key]


def _make_band(rows: Tensor) -> Tensor:
    """Make the band matrix (C, C): 1 for maps in the same window, else 0."""
    index = torch.arange(rows.shape[1], device=rows.device)
    return ((index[:, None] - index).abs() <= SIZE // 2).to(rows.dtype)
