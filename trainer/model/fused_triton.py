"""The kernels of ``trainer.model.fused`` for GPUs, in Triton.

One program computes all channels at a few places of a row, so neighbouring channels and overlapping windows are in the
cache of its multiprocessor. Memory traffic is the convolution's output, the pooled maps, and one byte per window for the
winner: about 2 + 3 / 4 bytes per unit of the convolution in bfloat16, where separate operations move more than 20. All
arithmetic is float32.

Tests compile the kernels for several GPUs, and compare them with the separate operations in Triton's interpreter, on a
CPU. They have not run on a GPU yet.

Kernels have no type annotations but ``tl.constexpr``: Triton's compiler evaluates each name in an annotation, and refuses
``Any``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model import lrn

_UNITS: Final = 1024
"""Units of a program: eight for each thread of four warps."""

_REACH = tl.constexpr(lrn.SIZE // 2)  # neighbours on each side in LRN's window
_K = tl.constexpr(lrn.K)


def forward(maps: Tensor, alpha: float, side: int, relu_first: bool) -> tuple[Tensor, Tensor]:
    """Return the pooled maps and each winner's place in its window, uint8; see ``trainer.model.fused``."""
    shape = [*maps.shape[:2], *((n - side) // 2 + 1 for n in maps.shape[2:])]
    last = maps.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    pooled = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=layout)
    winners = torch.empty_like(pooled, dtype=torch.uint8)
    block_c, block_x = _blocks(maps.shape[1])
    grid = (shape[0] * shape[2], triton.cdiv(shape[3], block_x))
    with _on(maps):
        _forward_kernel[grid](
            *(maps, pooled, winners, *maps.stride(), *pooled.stride()),
            *(maps.shape[1], shape[2], shape[3], alpha, side, relu_first, block_c, block_x),
        )
    return pooled, winners


def backward(gradient: Tensor, maps: Tensor, winners: Tensor, alpha: float, side: int, relu_first: bool) -> Tensor:
    """Return the gradient of ``maps``, with its dtype and memory format."""
    gradient = torch.empty_like(winners, dtype=gradient.dtype).copy_(
        gradient
    )  # in the layout of winners, whose strides the kernel uses
    back = torch.empty_like(maps)
    batch, channels, height, width = maps.shape
    block_c, block_x = _blocks(channels)
    grid = (batch * height, triton.cdiv(width, block_x))
    with _on(maps):
        _backward_kernel[grid](
            *(gradient, maps, winners, back, *maps.stride(), *winners.stride()),
            *(channels, height, width, *winners.shape[2:], alpha, side, relu_first, block_c, block_x),
        )
    return back


def _blocks(channels: int) -> tuple[int, int]:
    """Return the numbers of channels and columns of a program, powers of two as Triton requires."""
    block_c = triton.next_power_of_2(channels)
    return block_c, max(1, _UNITS // block_c)


def _on(maps: Tensor) -> Any:
    """Make the device of ``maps`` current, since Triton launches on torch's current device."""
    return torch.cuda.device(maps.device) if maps.is_cuda else nullcontext()


@triton.jit
def _squares(at, stride_c, channel, inside, channels, relu_first: tl.constexpr):
    """Return the sum of squares over LRN's window around ``channel``, at the places ``at``; ``inside`` masks real units."""
    total = tl.zeros(inside.shape, tl.float32)
    for d in tl.static_range(-_REACH, _REACH + 1):
        near = channel + d
        value = tl.load(at + near * stride_c, inside & (near >= 0) & (near < channels), 0.0).to(tl.float32)
        if relu_first:
            value = tl.where(value <= 0, 0.0, value)  # unlike tl.maximum, it keeps NaN
        total += value * value
    return total


@triton.jit
def _forward_kernel(
    maps, pooled, winners,
    map_b, map_c, map_y, map_x,  # strides of maps
    out_b, out_c, out_y, out_x,  # and of pooled and winners
    channels, out_height, out_width, alpha,
    side: tl.constexpr, relu_first: tl.constexpr, block_c: tl.constexpr, block_x: tl.constexpr,
):  # fmt: skip
    """Compute ``block_x`` windows of a row, all channels; tensors are (block_x, block_c)."""
    row = tl.program_id(0)
    image, top = (row // out_height).to(tl.int64), row % out_height
    left = tl.program_id(1) * block_x + tl.arange(0, block_x)[:, None]
    channel = tl.arange(0, block_c)[None, :]
    inside = (left < out_width) & (channel < channels)
    best = tl.full(inside.shape, float("-inf"), tl.float32)
    winner = tl.zeros(inside.shape, tl.int32)
    for dy in tl.static_range(side):
        for dx in tl.static_range(side):
            at = maps + image * map_b + (top * 2 + dy) * map_y + (left * 2 + dx) * map_x
            value = tl.load(at + channel * map_c, inside, 0.0).to(tl.float32)
            if relu_first:
                value = tl.where(value <= 0, 0.0, value)
            # s^-3/4 = s^-1/2 * (s^-1/2)^1/2, as in trainer.model.lrn: beta is 3/4 (paper section 3.3).
            root = tl.rsqrt(alpha * _squares(at, map_c, channel, inside, channels, relu_first) + _K)
            value = value * root * tl.sqrt(root)
            better = (value > best) | (value != value)  # NaN wins, as in torch's max_pool2d
            best = tl.where(better, value, best)
            winner = tl.where(better, dy * side + dx, winner)
    if not relu_first:
        best = tl.where(best <= 0, 0.0, best)
    to = image * out_b + top * out_y + left * out_x + channel * out_c
    tl.store(pooled + to, best.to(pooled.dtype.element_ty), inside)
    tl.store(winners + to, winner.to(tl.uint8), inside)


@triton.jit
def _backward_kernel(
    gradient, maps, winners, back,
    map_b, map_c, map_y, map_x,  # strides of maps and back
    out_b, out_c, out_y, out_x,  # and of gradient and winners
    channels, height, width, out_height, out_width, alpha,
    side: tl.constexpr, relu_first: tl.constexpr, block_c: tl.constexpr, block_x: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of ``block_x`` units of a row before pooling, all channels; tensors are (block_x, block_c).

    ``trainer.model.lrn.gradient_of_normalise`` has the formula. Each thread recomputes the sums of its neighbours: 25 loads
    from cache cost less than a synchronisation of threads.
    """
    row = tl.program_id(0)
    image, y = (row // height).to(tl.int64), row % height
    x = tl.program_id(1) * block_x + tl.arange(0, block_x)[:, None]
    channel = tl.arange(0, block_c)[None, :]
    inside = (x < width) & (channel < channels)
    at = maps + image * map_b + y * map_y + x * map_x
    own = tl.load(at + channel * map_c, inside, 0.0).to(tl.float32)
    direct = tl.zeros(inside.shape, tl.float32)
    around = tl.zeros(inside.shape, tl.float32)
    for d in tl.static_range(-_REACH, _REACH + 1):
        near = channel + d
        real = inside & (near >= 0) & (near < channels)
        value = tl.load(at + near * map_c, real, 0.0).to(tl.float32)
        came = tl.zeros(inside.shape, tl.float32)  # the gradient of the neighbour's normalised value
        for up in tl.static_range((side + 1) // 2):  # at stride 2, at most this many windows contain row y
            for before in tl.static_range((side + 1) // 2):
                top, left = y // 2 - up, x // 2 - before
                dy, dx = y - top * 2, x - left * 2
                there = real & (top >= 0) & (top < out_height) & (dy < side)
                there = there & (left >= 0) & (left < out_width) & (dx < side)
                spot = image * out_b + top * out_y + left * out_x + near * out_c
                won = tl.load(winners + spot, there, 255).to(tl.int32) == dy * side + dx
                came += tl.where(won, tl.load(gradient + spot, there, 0.0).to(tl.float32), 0.0)
        if relu_first:
            value = tl.where(value <= 0, 0.0, value)
        else:
            came = tl.where(value <= 0, 0.0, came)
        scale = alpha * _squares(at, map_c, near, real, channels, relu_first) + _K
        root = tl.rsqrt(scale)
        passed = came * root * tl.sqrt(root)
        around += passed * value / scale
        if d == 0:
            direct = passed
    if relu_first:
        found = tl.where(own <= 0, 0.0, direct - 1.5 * alpha * own * around)  # 2 beta = 1.5
    else:
        found = direct - 1.5 * alpha * own * around
    tl.store(back + image * map_b + y * map_y + x * map_x + channel * map_c, found.to(back.dtype.element_ty), inside)
