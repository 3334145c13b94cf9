"""Counters and metrics of a run."""

from __future__ import annotations

import math

import torch

from trainer.run.progress import LogInterval, Meter, Progress, Tally


def test_meter_adds_up_losses_and_errors() -> None:
    """Means are over images, also for batches of different sizes."""
    meter = Meter(torch.device("cpu"), Tally())
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    meter.add(torch.tensor(1.0), sure, torch.tensor([0, 0]))  # one of two wrong
    meter.add(torch.tensor(4.0), sure[:1], torch.tensor([1]))  # wrong
    tally = meter.read()
    assert tally == Tally(loss=6.0, wrong=2.0, images=3.0)
    assert tally.mean_loss == 2.0
    assert tally.error == 2 / 3


def test_meter_goes_on_from_a_tally() -> None:
    """A resumed epoch continues its sums, and a difference of tallies is an interval."""
    before = Tally(loss=6.0, wrong=2.0, images=3.0)
    meter = Meter(torch.device("cpu"), before)
    meter.add(torch.tensor(2.0), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert meter.read().since(before) == Tally(loss=2.0, wrong=0.0, images=1.0)


def test_nothing_counted_is_no_number() -> None:
    """The mean over no images is NaN."""
    assert math.isnan(Tally().mean_loss)
    assert math.isnan(Tally().error)


def test_shares_of_time() -> None:
    """Images per second include waiting; the waiting share is of the same time."""
    progress = Progress(images=300, trained_s=10.0, waited_s=2.5)
    assert progress.images_per_s == 30.0
    assert progress.waiting_share == 0.25
    assert Progress().waiting_share == 0.0


def test_a_window_is_what_happened_since_it_was_opened() -> None:
    """An interval has means over its images, its speed, its waiting share and its MFU."""
    progress = Progress(step=4, seen=40, epoch_tally=Tally(40.0, 30.0, 40.0), trained_s=10.0, waited_s=5.0)
    interval = LogInterval(progress, flops=1000, peak=100_000.0)
    progress.step, progress.seen, progress.epoch_tally = 6, 60, Tally(80.0, 40.0, 60.0)
    progress.trained_s, progress.waited_s = 12.0, 5.5
    record = interval.close(progress, 0.01)
    assert (record.loss, record.error, record.images_per_s) == (2.0, 0.5, 10.0)
    assert (record.waiting, record.mfu) == (0.25, 0.1)
    assert LogInterval(progress, flops=1000, peak=None).close(progress, 0.01).mfu is None
