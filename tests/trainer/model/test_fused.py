"""The fused operation, in PyTorch's operations and as Triton kernels, against the three separate operations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from trainer.model import fused
from trainer.model.fused import relu_lrn_pool
from trainer.model.lrn import local_response_norm

pytest.importorskip("triton", reason="the kernels need triton, whose interpreter runs them on a CPU")
from trainer.model import fused_triton

ALPHA = 1e-3
FORMS = list(itertools.product((3, 2), (True, False)))
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}


def one_by_one(maps: Tensor, side: int, relu_first: bool) -> Tensor:
    normalised = local_response_norm(functional.relu(maps) if relu_first else maps, ALPHA)
    pooled = functional.max_pool2d(normalised, side, 2)
    return pooled if relu_first else functional.relu(pooled)


def maps(dtype: torch.dtype = torch.float32, layout: str = "last", shape: tuple[int, ...] = (2, 7, 6, 9)) -> Tensor:
    """Return maps as large as conv1's, with many negative values and all different."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 60
    return drawn.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def weights(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("side", "relu_first"), FORMS)
def test_forward_and_backward_are_the_three_operations(side: int, relu_first: bool, layout: str) -> None:
    """Results and gradients agree in float64, for both window sides, ReLU positions and memory formats."""
    one = maps(torch.float64, layout).requires_grad_()
    other = one.detach().clone().requires_grad_()
    expected, found = one_by_one(one, side, relu_first), relu_lrn_pool(other, ALPHA, side, relu_first)
    (expected * weights(expected)).sum().backward()
    (found * weights(found)).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize(("side", "relu_first"), FORMS)
def test_backward_is_the_derivative(side: int, relu_first: bool) -> None:
    """The gradient agrees with finite differences."""
    given = maps(torch.float64, shape=(1, 6, 5, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relu_lrn_pool(x, ALPHA, side, relu_first), (given,))


def test_it_may_stand_in_compiled_code() -> None:
    """Torch's own checks of a custom operator pass."""
    opcheck(fused._forward, (maps().requires_grad_(), ALPHA, 3, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("side", "relu_first"), FORMS)
def test_kernels_are_the_three_operations(side: int, relu_first: bool, layout: str) -> None:
    """In Triton's interpreter, the kernels' results and gradients agree in float32."""
    given = maps(layout=layout).requires_grad_()
    expected = one_by_one(given, side, relu_first)
    (expected * weights(expected)).sum().backward()
    pooled, winners = fused_triton.forward(given.detach(), ALPHA, side, relu_first)
    gradient = fused_triton.backward(weights(expected), given.detach(), winners, ALPHA, side, relu_first)
    torch.testing.assert_close(pooled, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, given.grad, rtol=1e-4, atol=1e-6)


def test_kernels_take_bfloat16_and_calculate_in_float32() -> None:
    """Results for bfloat16 maps differ from float32's in the last bit: the interpreter truncates where GPUs round."""
    given = maps(torch.bfloat16, shape=(1, 7, 5, 9))
    pooled, winners = fused_triton.forward(given, ALPHA, 3, True)
    exact, places = fused_triton.forward(given.float(), ALPHA, 3, True)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), exact, rtol=2**-7, atol=0)
    assert torch.equal(winners, places)
    gradient = fused_triton.backward(weights(pooled), given, winners, ALPHA, 3, True)
    expected = fused_triton.backward(weights(pooled).float(), given.float(), winners, ALPHA, 3, True)
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-7, atol=0)


def test_kernels_pass_on_what_is_no_number() -> None:
    """ReLU and pooling keep a NaN, so that the loss shows it."""
    given = maps(shape=(1, 3, 5, 5))
    given[0, 1, 2, 2] = torch.nan
    pooled, _ = fused_triton.forward(given, ALPHA, 3, True)
    assert pooled.isnan().any()
    assert relu_lrn_pool(given, ALPHA).isnan().any()
