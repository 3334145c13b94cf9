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
from trainer.run.divergence import EXPLODED, DivergenceMonitor, start_warning
from trainer.run.progress import StepRecord, Tally
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


def line(step: int, loss: float) -> StepRecord:
    return StepRecord(step, 0, 100, loss, 0.9, 0.01, 100.0, 0.0)


def test_a_loss_of_guessing_after_300_steps_is_a_warning() -> None:
    """The first line from step 300 on tells that the network still guesses, and what helps."""
    assert start_warning(line(300, 2.30), 280, 10) == (
        "The loss after 300 steps, 2.30, is not below that of guessing, ln 10 = 2.30. What helps: --batch-size 32, "
        "--lr .02, or --preset original, whose wider weights start sooner."
    )
    assert "after 320 steps, 6.91, is not below that of guessing, ln 1000 = 6.91" in str(
        start_warning(line(320, 6.91), 299, 1000)
    )


@pytest.mark.parametrize(
    ("step", "first", "loss", "classes"),
    [(280, 260, 2.30, 10), (320, 300, 2.30, 10), (300, 280, 2.20, 10), (300, 280, 0.0, 1)],
    ids=["too early", "told before", "learning", "one class"],
)
def test_otherwise_there_is_no_warning(step: int, first: int, loss: float, classes: int) -> None:
    """Neither earlier lines nor later ones warn, nor a loss that has fallen, nor a split of one class."""
    assert start_warning(line(step, loss), first, classes) is None
