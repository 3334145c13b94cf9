"""Dropout as the paper has it: nothing is scaled in training, everything is halved in use."""

from __future__ import annotations

import numpy as np
import torch

from trainer.chance import DropoutKey, dropout_bits
from trainer.dropout import drop_half, halve

KEY = DropoutKey(seed=5, step=9)


def test_masks_are_the_addressed_bits() -> None:
    """Unit i of the batch, in C order, is kept if bit i says so; kept units are not scaled."""
    units = torch.full((3, 7), 2.5)
    kept = np.unpackbits(dropout_bits(KEY, 1, 6, 21))[:21].reshape(3, 7)
    assert torch.equal(drop_half(units, KEY, 1, 6), torch.from_numpy(kept * np.float32(2.5)))


def test_dropped_units_get_no_gradient() -> None:
    """The gradient is the mask."""
    units = torch.ones(4, 33, requires_grad=True)
    out = drop_half(units, KEY, 0, 7)
    out.sum().backward()
    assert torch.equal(units.grad, out.detach())


def test_without_a_key_torch_decides() -> None:
    """Users' own loops get masks from torch's generator, also unscaled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = drop_half(torch.ones(64, 64), None, 0, 6)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert abs(out.mean().item() - 0.5) < 4 * 0.5 / 64


def test_in_use_outputs_are_halved() -> None:
    """The mean over all masks."""
    assert torch.equal(halve(torch.tensor([[2.0, 3.0]])), torch.tensor([[1.0, 1.5]]))
