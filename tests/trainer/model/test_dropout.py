"""Dropout as in the paper: outputs are not scaled in training and are halved at test time."""

from __future__ import annotations

import numpy as np
import torch

from trainer.model.dropout import dropout_mask, halve
from trainer.model.rng import DropoutKey, dropout_bits

CPU = torch.device("cpu")
KEY = DropoutKey(seed=5, step=9)


def test_masks_are_the_addressed_bits() -> None:
    """Unit i of a batch, in C order, is kept if bit i is 1."""
    kept = np.unpackbits(dropout_bits(KEY, 1, 6, 21))[:21].reshape(3, 7).astype(bool)
    assert torch.equal(dropout_mask((3, 7), KEY, 1, 6, CPU), torch.from_numpy(kept))


def test_without_a_key_torch_decides() -> None:
    """Without a key the masks come from torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = dropout_mask((64, 64), None, 0, 6, CPU)
    assert abs(kept.double().mean().item() - 0.5) < 4 * 0.5 / 64


def test_in_use_outputs_are_halved() -> None:
    """At test time outputs are halved, the expectation over all masks."""
    assert torch.equal(halve(torch.tensor([[2.0, 3.0]])), torch.tensor([[1.0, 1.5]]))
