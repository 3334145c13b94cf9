"""Dropout as the paper has it: nothing is scaled in training, everything is halved in use."""

from __future__ import annotations

import numpy as np
import torch

from trainer.model.dropout import dropout_mask, halve
from trainer.model.rng import DropoutKey, dropout_bits

CPU = torch.device("cpu")
KEY = DropoutKey(seed=5, step=9)


def test_masks_are_the_addressed_bits() -> None:
    """Unit i of the batch, in C order, is kept if bit i says so."""
    kept = np.unpackbits(dropout_bits(KEY, 1, 6, 21))[:21].reshape(3, 7).astype(bool)
    assert torch.equal(dropout_mask((3, 7), KEY, 1, 6, CPU), torch.from_numpy(kept))


def test_without_a_key_torch_decides() -> None:
    """Users' own loops get masks from torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = dropout_mask((64, 64), None, 0, 6, CPU)
    assert abs(kept.double().mean().item() - 0.5) < 4 * 0.5 / 64


def test_in_use_outputs_are_halved() -> None:
    """The mean over all masks."""
    assert torch.equal(halve(torch.tensor([[2.0, 3.0]])), torch.tensor([[1.0, 1.5]]))
