"""Detection of divergence, and its report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trainer.config import RunConfig
from trainer.data.normalisation import Facts
from trainer.errors import TrainingDiverged
from trainer.parallel.world import World
from trainer.run.divergence import EXPLODED, DivergenceMonitor
from trainer.run.progress import Tally
from trainer.run.state import State

ALONE = World((torch.device("cpu"),))
GUESSING = math.log(3)


def training() -> State:
    facts = Facts(300, ("ant", "bee", "cat"), "abc", torch.zeros(256, 256, 3), 224)
    return State.begin(RunConfig(width=0.05), facts, ALONE, None)


def test_a_loss_far_above_guessing_has_exploded() -> None:
    """A loss up to the limit passes; a higher one is reported with step, layer and checkpoint."""
    state = training()
    monitor = DivergenceMonitor(state, ALONE)
    monitor.check(Tally(loss=10 * EXPLODED * GUESSING * 0.99, wrong=0, images=10), lambda: None)
    state.progress.step = 7
    with pytest.raises(TrainingDiverged) as caught:
        monitor.check(Tally(loss=10 * EXPLODED * GUESSING * 1.01, wrong=0, images=10), lambda: Path("last.pt"))
    assert (caught.value.step, caught.value.checkpoint) == (7, Path("last.pt"))
    assert caught.value.layer in dict(state.model.named_parameters())
    assert "exploded to 11.1 at step 7" in str(caught.value)
    assert "the last good checkpoint is last.pt; try a smaller --lr" in str(caught.value)


def test_a_loss_that_is_no_number() -> None:
    """A NaN loss is a divergence, even with finite weights."""
    with pytest.raises(TrainingDiverged, match="the loss became NaN or infinite at step 0"):
        DivergenceMonitor(training(), ALONE).check(Tally(loss=math.nan, wrong=0, images=10), lambda: None)


def test_a_weight_that_is_no_number_is_named() -> None:
    """A weight that is not finite is reported, also before an image is counted."""
    state = training()
    with torch.no_grad():
        state.model.get_parameter("towers.1.conv3.weight")[0, 0, 0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match=r"inspect towers\.1\.conv3\.weight first"):
        DivergenceMonitor(state, ALONE).check(Tally(), lambda: None)


def test_a_training_of_no_steps_is_sound() -> None:
    """A state without a step passes."""
    monitor = DivergenceMonitor(training(), ALONE)
    monitor.check(Tally(), lambda: None)
    assert monitor.param_stats["towers.0.conv1.weight"].mean_w > 0
