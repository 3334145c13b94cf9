"""LRN against the paper's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.model.lrn import ALPHA, local_response_norm


def by_the_formula(a: np.ndarray, alpha: float) -> np.ndarray:
    """Apply section 3.3: b_i = a_i / (2 + alpha * sum over max(0, i-2)..min(N-1, i+2) of a_j^2)^.75."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        total = np.zeros_like(a[:, 0])
        for j in range(max(0, i - 2), min(maps - 1, i + 2) + 1):
            total += a[:, j] ** 2
        b[:, i] = a[:, i] / (2 + alpha * total) ** 0.75
    return b


@pytest.mark.parametrize("maps", [1, 3, 5, 12])
@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 5])
def test_forward_is_the_formula(maps: int, alpha: float) -> None:
    """Results equal the formula for values as large as conv1's, also with fewer maps than the window."""
    a = np.random.default_rng(0).normal(0, 300, (2, maps, 4, 3))
    b = local_response_norm(torch.from_numpy(a), alpha).numpy()
    np.testing.assert_allclose(b, by_the_formula(a, alpha), rtol=1e-12)


def test_backward_is_the_derivative() -> None:
    """The hand-written gradient agrees with finite differences."""
    a = torch.from_numpy(np.random.default_rng(0).normal(0, 100, (1, 7, 2, 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 1e-3), (a,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_memory_layout_gives_the_same(layout: torch.memory_format) -> None:
    """Channels-last and contiguous maps give equal values and gradients."""
    base = torch.from_numpy(np.random.default_rng(0).normal(0, 100, (2, 6, 3, 5)).astype(np.float32))
    one = base.clone().requires_grad_()
    other = base.clone(memory_format=layout).requires_grad_()
    weights = torch.arange(6.0).view(1, 6, 1, 1)
    for a in (one, other):
        (local_response_norm(a) * weights).sum().backward()
    assert torch.equal(local_response_norm(one), local_response_norm(other))
    assert torch.equal(one.grad, other.grad)


def test_squares_are_float32_under_autocast() -> None:
    """bfloat16 maps give a result that is rounded once, at the end."""
    a = torch.from_numpy(np.random.default_rng(0).normal(0, 300, (2, 12, 4, 3)).astype(np.float32)).to(torch.bfloat16)
    exact = local_response_norm(a.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = local_response_norm(a)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=2**-8, atol=0)
