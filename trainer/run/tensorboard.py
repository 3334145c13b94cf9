"""TensorBoard event files of a run, in RUN/tensorboard, with the figures of the log by step.

A resumed run hides the events of steps that it repeats after a crash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tensorboardX import SummaryWriter

from trainer.run.param_stats import ParamStats
from trainer.run.progress import EpochRecord, StepRecord

_FLUSH_S: Final = 10
"""Longest delay of the event files behind the run."""


class TensorBoard:
    """A writer of event files.

    Args:
        folder: folder of the event files.
        step: updates made so far.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # purge_step hides events of later steps, which a run that crashed may have written.
        self._writer = SummaryWriter(logdir=str(folder), purge_step=step + 1, flush_secs=_FLUSH_S)

    def step(self, record: StepRecord, stats: Mapping[str, ParamStats]) -> None:
        """Write the steps since the last log line, and the parameter statistics."""
        values: dict[str, float | None] = {
            "train/loss": record.loss,
            "train/error": record.error,
            "train/learning rate": record.lr,
            "speed/images per second": record.images_per_s,
            "speed/waiting for data": record.waiting,
            "speed/model FLOP utilisation": record.mfu,
        }
        for name, each in stats.items():
            values |= {f"mean w/{name}": each.mean_w, f"mean dw/{name}": each.mean_dw, f"dw by w/{name}": each.ratio}
        self._add(values, record.step)

    def epoch(self, record: EpochRecord) -> None:
        """Write the validation after an epoch."""
        errors = {"top-1 error": record.val_top1_error, "top-5 error": record.val_top5_error}
        average: dict[str, float | None] = {
            "validation of average/loss": record.ema_val_loss,
            "validation of average/top-1 error": record.ema_val_top1_error,
            "validation of average/top-5 error": record.ema_val_top5_error,
        }
        self._add(average, record.step)
        self._add(
            {f"validation/{name}": value for name, value in {"loss": record.val_loss, **errors}.items()}, record.step
        )

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()

    def _add(self, values: Mapping[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
