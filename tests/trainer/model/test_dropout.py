"""Dropout as in the paper: outputs are not scaled in training and are halved at test time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.model.dropout import MaskPlan, dropout_mask, halve
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


def test_a_plan_counts_the_batches_of_each_step() -> None:
    """Without accumulation each batch is a step; with it, an epoch's last step has the batches that are left."""
    assert [MaskPlan(KEY, {}).key(number) for number in range(3)] == [replace(KEY, step=9 + n) for n in range(3)]
    plan = MaskPlan(KEY, {}, accumulate=3, images=20, left=4, per_epoch=5)
    rest, epoch = [(9, 0), (9, 20), (9, 40), (10, 0)], [(11, 0), (11, 20), (11, 40), (12, 0), (12, 20)]
    expected = [*rest, *epoch, *((step + 2, first) for step, first in epoch)]
    assert [plan.key(number) for number in range(14)] == [replace(KEY, step=s, first=first) for s, first in expected]
    between_epochs = replace(plan, left=0)
    assert [between_epochs.key(number).step for number in range(6)] == [9, 9, 9, 10, 10, 11]


def test_a_plan_draws_the_masks_of_parts() -> None:
    """Masks drawn for a later batch of a step are those of its key, also from the middle of a byte."""
    plan = MaskPlan(KEY, {(0, 6): 13, (1, 7): 5}, accumulate=2, images=7, left=2)
    masks = plan.drawn(1, 4, [torch.from_numpy(plan.draw(1, 4))])
    assert masks.key == replace(KEY, first=7)
    for (tower, layer), units in plan.units.items():
        expected = dropout_mask((4, units), masks.key, tower, layer, CPU)
        assert torch.equal(dropout_mask((4, units), masks, tower, layer, CPU), expected)
