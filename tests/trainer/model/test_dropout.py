"""Dropout as in the paper: outputs are not scaled in training and are halved at test time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
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


@pytest.mark.parametrize("units", [8, 13, 300])
def test_masks_of_parts_are_those_of_the_whole(units: int) -> None:
    """Passes over parts of a batch, each with the images before it, drop what one pass over the whole drops."""
    whole = dropout_mask((50, units), KEY, 1, 6, torch.device("cpu"))
    parts = [
        dropout_mask((count, units), replace(KEY, first=first), 1, 6, torch.device("cpu"))
        for first, count in ((0, 7), (7, 40), (47, 3))
    ]
    assert torch.equal(torch.cat(parts), whole)
