"""The recorder of a run: it writes log, TensorBoard events, checkpoints and summary.

All processes of a run call its methods together, since each has a part of the data; the first process writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from loader_service.types import EpochAccount
from trainer.errors import CheckpointError
from trainer.parallel.world import World
from trainer.report import kernels
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint, Plain, Saver
from trainer.run.console import Reporter
from trainer.run.folder import RunFolder
from trainer.run.param_stats import ParamStats, ParamStatsRecord
from trainer.run.progress import EpochRecord, StepRecord
from trainer.run.state import State
from trainer.run.step_clock import TimeRecord
from trainer.run.summary import Summary, as_numbers, from_numbers, merge_accounts
from trainer.run.tensorboard import TensorBoard


class Event(StrEnum):
    """Events of a run in the log; the values stand in its ``event`` fields."""

    START = "start"
    RESUME = "resume"
    SET_LR = "set-lr"
    NOT_SAVED = "not-saved"
    NOT_STARTED = "not-started"
    STOP = "stop"
    END = "end"


class Recorder:
    """The recorder of one training; use it as a context manager.

    Args:
        folder: folder of the run.
        state: state of the training.
        world: processes of the run.
        accounts: function that returns the loader's accounts of the samples that this process has received.
        reporter: progress display.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: State,
        world: World,
        accounts: Callable[[], list[EpochAccount]],
        reporter: Reporter,
    ) -> None:
        self._folder, self._state, self._world = folder, state, world
        self._accounts, self._reporter = accounts, reporter
        self._first_epoch = state.progress.epoch
        self._saver = Saver(folder.checkpoints)
        self._tensorboard: TensorBoard | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        if self._world.is_first:
            self._tensorboard = TensorBoard(self._folder.tensorboard, self._state.progress.step)
            self._stack.callback(self._tensorboard.close)
        self._stack.enter_context(self._saver)  # closed first: it waits for the last write
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def note(self, event: Event, **more: float | str) -> None:
        """Log an event with the run's position and ``more`` fields."""
        progress = self._state.progress
        where = {"step": progress.step, "epoch": progress.epoch, "seen": progress.seen}
        self._log({"event": event, "unix_s": time.time(), **where, **more})

    def step(self, record: StepRecord, stats: Mapping[str, ParamStats], times: TimeRecord) -> None:
        """Record the steps since the last log line, the parameter statistics, and the time of each phase."""
        self._log(record)
        self._log(ParamStatsRecord.of(record.step, stats))
        self._log(times)
        if self._tensorboard:
            self._tensorboard.step(record, stats)
        self._reporter.step(record)
        self._report_failed_save(self._saver.failure())  # of an earlier save, whose thread has ended

    def epoch(self, record: EpochRecord) -> None:
        """Record an epoch."""
        self._log(record)
        if self._tensorboard:
            self._tensorboard.epoch(record)
        self._reporter.epoch(record)

    def time(self, times: TimeRecord) -> None:
        """Record the time of each phase since the last record of it, after a validation."""
        self._log(times)

    def save(self, is_best: bool = False, rate_by_hand: float = 0.0) -> None:
        """Start to write a checkpoint of the current state.

        Args:
            is_best: True if no earlier epoch had a lower validation error.
            rate_by_hand: requested learning rate that this checkpoint includes; 0 for none. The request is cleared when
                the checkpoint is on disk.
        """
        state = self._state
        model = self._world.merge_towers(state.model.state_dict())
        momentum = self._world.merge_towers(state.optimizer.momentum())
        ema = self._world.merge_towers(state.ema.weights()) if state.ema else {}
        plain = Plain(
            config=state.config,
            progress=state.progress,
            schedule=state.schedule,
            loader=state.loader,
            ledger=self.ledger(),
            history=state.history,
            class_names=state.facts.class_names,
            fingerprint=state.facts.fingerprint,
            count=state.facts.count,
            crop=state.facts.crop,
        )
        # All processes have taken part in the gathering above; the first one writes.
        if not self._world.is_first:
            return
        whole = Checkpoint(plain, model, momentum, state.facts.mean, checkpoint.random_states(), ema)
        self._saver.save(whole, is_best, partial(self._folder.clear_requested_rate, rate_by_hand))

    def finish(self) -> Path:
        """Wait until the newest checkpoint is on disk, and return its path.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._saver.finish()
        return checkpoint.path_of(self._folder.checkpoints, self._state.progress.step)

    def newest(self) -> Path | None:
        """Return the last good checkpoint, None if there is none."""
        self._saver.wait()  # the newest one may be being written
        return self._folder.newest_checkpoint()

    def summarise(self) -> Summary:
        """Write the summary of the results so far, and the picture of the first layer's kernels."""
        state, progress, best = self._state, self._state.progress, self._state.schedule.best
        towers = self._world.merge_towers(
            {name: weights for name, weights in state.model.state_dict().items() if name.endswith("conv1.weight")}
        )
        first = self._world.is_first
        last = state.history[-1] if state.history else None
        summary = Summary(
            finished=progress.epoch >= state.config.epochs,
            epochs=progress.epoch,
            steps=progress.step,
            accuracy=1 - last.val_top1_error if last else None,
            top5_accuracy=1 - last.val_top5_error if last else None,
            best_accuracy=1 - best if best is not None else None,
            chance=1 / len(state.facts.class_names),
            images_per_s=progress.images_per_s,
            waiting_share=progress.waiting_share,
            ledger=self.ledger(),
            checkpoint=str(self._folder.newest_checkpoint() or ""),
            log=str(self._folder.log),
            figures=[str(self._folder.kernels)],
        )
        if first:
            done = f"{progress.epoch} epochs" if progress.epoch != 1 else "1 epoch"
            kernels.save_sheet(self._folder.kernels, list(towers.values()), f"First-layer kernels after {done}")
            self._folder.write_summary(summary)
        return summary

    def ledger(self) -> list[EpochAccount]:
        """Return the accounts of all epochs begun, also before a resume; ``delivered`` counts the samples trained on."""
        progress = self._state.progress
        epochs = range(self._first_epoch, progress.epoch + 1)
        rows = self._world.gather(as_numbers(self._accounts(), epochs))
        merged = merge_accounts(self._state.earlier_accounts, from_numbers(rows, epochs))
        # The loader has delivered batches that are not trained on yet; the current epoch counts only those that are.
        return [
            msgspec.structs.replace(account, delivered=progress.seen) if account.epoch == progress.epoch else account
            for account in merged
            if account.epoch < progress.epoch or progress.seen
        ]

    def _report_failed_save(self, failure: CheckpointError | None) -> None:
        if failure:
            self.note(Event.NOT_SAVED, reason=failure.reason)
            self._reporter.say(f"Not saved: {failure} The run continues and tries the next checkpoint as usual.")

    def _log(self, record: msgspec.Struct | dict[str, Any]) -> None:
        """Append a line to the log, in the first process."""
        if self._world.is_first:
            self._folder.append(record)
