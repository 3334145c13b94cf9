"""Counters and metrics of a run, as plain values for the log and the checkpoint."""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor


class Tally(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sums over images: loss, wrong best guesses, and number of images."""

    loss: float = 0.0
    wrong: float = 0.0
    images: float = 0.0

    def since(self, before: Tally) -> Tally:
        """Return the difference to an earlier tally."""
        return Tally(self.loss - before.loss, self.wrong - before.wrong, self.images - before.images)

    @property
    def mean_loss(self) -> float:
        """Loss per image; NaN without images."""
        return self.loss / self.images if self.images else math.nan

    @property
    def error(self) -> float:
        """Fraction of images with a wrong best guess, 0 to 1; NaN without images."""
        return self.wrong / self.images if self.images else math.nan


class Meter:
    """A tally on the device, so that no step waits for the GPU."""

    def __init__(self, device: torch.device, start: Tally) -> None:
        # (3,); float64 counts the images of an epoch exactly.
        self._sums = torch.tensor([start.loss, start.wrong, start.images], dtype=torch.float64).to(device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch, given its mean loss (), logits (B, classes) and labels (B,)."""
        self.add_sums(sums_of(loss, logits, labels))

    def add_sums(self, sums: Tensor) -> None:
        """Add a result of ``sums_of``."""
        self._sums += sums

    def read(self) -> Tally:
        """Return the sums so far; waits for the device."""
        return Tally(*self._sums.tolist())


def sums_of(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums of a tally over one batch, (3,) float64 on its device: loss, wrong best guesses, images.

    Args:
        loss: (), mean over the batch.
        logits: (B, classes).
        labels: (B,) int64.
    """
    images = len(labels)
    wrong = (logits.detach().argmax(1) != labels).sum()
    return torch.stack([loss.detach().double() * images, wrong, torch.full_like(wrong, images)])


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """The counters of a run.

    Fields:
        step: updates of the weights.
        epoch: number of the current epoch, from 0.
        seen: positions of this epoch that have been trained on.
        epoch_tally: sums of this epoch.
        images: images trained on, over all epochs.
        lr: learning rate of the last step; 0 before the first, and in files of version 0.1.
        trained_s, waited_s: seconds of training without validation, and the part of them spent waiting for data.
    """

    step: int = 0
    epoch: int = 0
    seen: int = 0
    epoch_tally: Tally = Tally()
    images: int = 0
    lr: float = 0.0
    trained_s: float = 0.0
    waited_s: float = 0.0

    def start_next_epoch(self) -> None:
        """Advance to the next epoch and reset its counters."""
        self.epoch, self.seen, self.epoch_tally = self.epoch + 1, 0, Tally()

    @property
    def images_per_s(self) -> float:
        """Images trained on per second, waiting included."""
        return self.images / self.trained_s if self.trained_s else 0.0

    @property
    def waiting_share(self) -> float:
        """Fraction of the training time spent waiting for data, 0 to 1."""
        return self.waited_s / self.trained_s if self.trained_s else 0.0


class StepRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="step", tag_field="event"):
    """A log line for the steps since the previous one.

    ``error``, ``waiting`` (time spent waiting for data) and ``mfu`` (see ``trainer.model.flops``; None if the devices' peak
    is unknown) are fractions, 0 to 1.
    """

    step: int
    epoch: int
    seen: int
    loss: float
    error: float
    lr: float
    images_per_s: float
    waiting: float
    mfu: float | None = None


class EpochRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="epoch", tag_field="event"):
    """A log line for an epoch: its training, and the validation after it (centre crop).

    The ``ema`` fields are the validation of the moving average of the weights; None without --ema.
    """

    epoch: int
    step: int
    loss: float
    error: float
    val_loss: float
    val_top1_error: float
    val_top5_error: float
    lr: float
    ema_val_loss: float | None = None
    ema_val_top1_error: float | None = None
    ema_val_top5_error: float | None = None


class LogInterval:
    """The steps between two log lines.

    Args:
        progress: counters at the start.
        flops: FLOP of the model for one image, forward and backward.
        peak: peak FLOP/s of all devices of the run; None if unknown.
    """

    def __init__(self, progress: Progress, flops: int, peak: float | None) -> None:
        self._before, self._flops, self._peak = msgspec.structs.replace(progress), flops, peak  # a copy of the counters

    @property
    def first_step(self) -> int:
        """Updates of the weights before the interval."""
        return self._before.step

    def tally(self, progress: Progress) -> Tally:
        """Return the sums since the start."""
        return progress.epoch_tally.since(self._before.epoch_tally)

    def close(self, progress: Progress, lr: float) -> StepRecord:
        """Return the log line of these steps."""
        before, tally = self._before, self.tally(progress)
        trained_s = max(progress.trained_s - before.trained_s, 1e-9)
        images_per_s = tally.images / trained_s
        return StepRecord(
            step=progress.step,
            epoch=progress.epoch,
            seen=progress.seen,
            loss=tally.mean_loss,
            error=tally.error,
            lr=lr,
            images_per_s=images_per_s,
            waiting=(progress.waited_s - before.waited_s) / trained_s,
            mfu=images_per_s * self._flops / self._peak if self._peak else None,
        )
