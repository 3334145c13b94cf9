"""The training loop: epochs of steps, a validation after each, checkpoints on the way.

Everything that a step changes is in ``Training``; everything of it that must survive is in its checkpoint. Rules of the
file:

1. The loader's position is taken down after a step is complete, so a checkpoint never counts an image that has not
   been trained on, nor trains on one twice.
2. An epoch is over when all of its positions have been trained on and validated. A run stopped between the two
   validates when it goes on.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from trainer import checkpoint, figures
from trainer.centre import Centre
from trainer.chance import DropoutKey
from trainer.checkpoint import Checkpoint, Plain
from trainer.config import RunConfig
from trainer.devices import choose_devices
from trainer.errors import ConfigError, TrainingDiverged
from trainer.evaluate import Evaluation, Member, build, evaluate, restore
from trainer.feed import Batch, Feed, LoaderServiceError, Node, training_view
from trainer.ledger import Account, merge_accounts
from trainer.model import AlexNet
from trainer.optimizer import PaperSGD
from trainer.preset import preset_named
from trainer.progress import EpochRecord, Meter, Progress, StepRecord
from trainer.report import Reporter
from trainer.run_folder import RunFolder
from trainer.stop import Stopped, StopRequest
from trainer.summary import Summary


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from, and where it lies."""

    path: Path
    saved: Checkpoint


def train(
    config: RunConfig, folder: RunFolder, node: Node, console: Console, stop: StopRequest, resume: Resume | None
) -> Summary:
    """Train until the last epoch is over, or until ``stop`` is asked for.

    Args:
        config: of the run.
        folder: where its results go.
        node: which feeds it.
        console: where progress is shown.
        stop: asked after each step; a checkpoint is saved before leaving.
        resume: where an earlier run was left.

    Raises:
        TrainerError: the loss is no longer a number, a device is missing, a checkpoint cannot be written, ...
        LoaderServiceError: the node cannot serve.
    """
    devices = choose_devices(config.devices, config.towers)
    state = resume.saved.plain.loader if resume else None
    with ExitStack() as stack:
        with stop.interruptible():
            view = training_view(preset_named(config.preset), config.variation, node)
            feed = Feed(node, "train", view, config.batch_size, devices, config.seed, config.epochs, state)
        stack.enter_context(feed)
        reporter = stack.enter_context(Reporter(console, config.epochs, feed.facts.count))
        training = Training(config, folder, node, feed, devices, reporter, stop, resume)
        try:
            training.run()
        except (Stopped, LoaderServiceError) as why:
            path = training.save()
            training.note("stop")
            reporter.say(f"Stopped at step {training.step}: {path} is where --resume auto goes on.")
            if isinstance(why, LoaderServiceError):
                raise
        return training.summarise()


class Training:
    """One run: the network and everything else that a step changes."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        node: Node,
        feed: Feed,
        devices: tuple[torch.device, ...],
        reporter: Reporter,
        stop: StopRequest,
        resume: Resume | None,
    ) -> None:
        self._config, self._folder, self._node = config, folder, node
        self._feed, self._devices, self._reporter, self._stop = feed, devices, reporter, stop
        self._facts = feed.facts
        if not self._facts.count:
            raise ConfigError("--data", node.address, "a training split with at least one image")
        self._model = build(config, len(self._facts.class_names), devices)
        self._centre = Centre(self._facts.mean, self._model.preset, devices)
        self._schedule = config.first_schedule()
        self._progress = Progress()
        self._earlier: list[Account] = []
        self._history: list[EpochRecord] = []
        if resume:
            self._take_over(resume)
        self._optimizer = PaperSGD(self._model, self._model.preset, self._rate())
        if resume:
            self._optimizer.load_momentum(resume.saved.momentum)
        self._meter = Meter(devices[0], self._progress.epoch_tally)
        self._position = feed.state()
        self._window = _Window(self._progress)
        self.note("resume" if resume else "start")

    @property
    def step(self) -> int:
        """Updates of the weights so far."""
        return self._progress.step

    def run(self) -> None:
        """All epochs that remain."""
        while self._progress.epoch < self._config.epochs:
            self._train_epoch()
            self._end_epoch()
        self.note("end")

    def _rate(self) -> float:
        """The learning rate of the next step."""
        return self._schedule.rate(self._epochs_done(), self._config.epochs)

    def _epochs_done(self) -> float:
        return self._progress.epoch + self._progress.seen / self._facts.count

    def _obey_hand(self) -> None:
        """Take over a learning rate that somebody has set by hand meanwhile.

        The request goes away only when a checkpoint holds its effect, so that a crash cannot lose it.
        """
        wanted = self._folder.wanted_rate()
        if wanted is None:
            return
        self._schedule = self._schedule.by_hand(wanted, self._epochs_done(), self._config.epochs)
        self.note("set-lr", lr=wanted, before=self._optimizer.lr)
        self._reporter.say(f"By hand: the learning rate is {wanted:g} from step {self.step + 1} on.")
        self._optimizer.set_lr(wanted)
        self.save()
        self._folder.forget_wanted_rate()

    def _train_epoch(self) -> None:
        """The steps of an epoch that have not been made yet."""
        progress, config = self._progress, self._config
        self._model.train()
        self._window = _Window(progress)
        while progress.seen < self._facts.count:
            self._stop.check()
            self._obey_hand()
            began_s, waited_s = time.perf_counter(), self._feed.waited_s
            with self._stop.interruptible():
                batch = next(self._feed)
            self._step(batch)
            self._position = self._feed.state()
            over = progress.seen == self._facts.count
            log_now = over or progress.step % config.log_every == 0
            save_now = not over and config.checkpoint_every > 0 and progress.step % config.checkpoint_every == 0
            if log_now or save_now:
                self._read_meter()  # before the clock: what the device still had to do is part of the steps' time
            progress.trained_s += time.perf_counter() - began_s
            progress.waited_s += self._feed.waited_s - waited_s
            if log_now:
                self._log_step()
            if save_now:
                self.save()
        self._stop.check()

    def _step(self, batch: Batch) -> None:
        """One update of the weights."""
        progress = self._progress
        self._optimizer.set_lr(self._rate())
        images = self._centre(batch.images, batch.windows)
        logits = self._model(images, DropoutKey(self._config.seed, progress.step))
        loss = functional.cross_entropy(logits, batch.labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._meter.add(loss, logits, batch.labels)
        progress.step += 1
        progress.seen += len(batch.labels)
        progress.images += len(batch.labels)

    def _end_epoch(self) -> None:
        """Validate, let the schedule decide on the learning rate, and save."""
        progress, lr, before = self._progress, self._optimizer.lr, self._schedule
        self._read_meter()
        with self._stop.interruptible():
            result = self._validate()
        record = EpochRecord(
            epoch=progress.epoch,
            step=progress.step,
            loss=progress.epoch_tally.mean_loss,
            error=progress.epoch_tally.error,
            val_loss=result.loss,
            val_top1_error=result.top1_error,
            val_top5_error=result.top5_error,
            lr=lr,
        )
        is_best = self._schedule.improves(result.top1_error)
        self._schedule = self._schedule.after_epoch(result.top1_error)
        self._history.append(record)
        progress.start_next_epoch()
        self._meter = Meter(self._devices[0], progress.epoch_tally)
        self._folder.append(record)
        self.save(is_best)
        self._reporter.epoch(record)
        if self._schedule.drops > before.drops:
            self._reporter.say(f"The validation error has stalled: the learning rate drops to {self._schedule.lr:g}.")
        self.summarise()

    def _validate(self) -> Evaluation:
        with Feed(self._node, "val", "center", self._config.batch_size, self._devices) as batches:
            return evaluate([Member(self._model, self._centre)], batches)

    def save(self, is_best: bool = False) -> Path:
        """Write a checkpoint of this moment and return its path.

        Raises:
            TrainingDiverged: a weight is no number: such a checkpoint would only push out good ones.
        """
        self._read_meter()
        if not_finite(self._model):
            raise self._diverged()
        plain = Plain(
            config=self._config,
            progress=self._progress,
            schedule=self._schedule,
            loader=self._position,
            ledger=self._ledger(),
            history=self._history,
            class_names=self._facts.class_names,
            fingerprint=self._facts.fingerprint,
            count=self._facts.count,
        )
        tensors = self._model.state_dict(), self._optimizer.momentum(), self._facts.mean, checkpoint.random_states()
        return checkpoint.save(self._folder.checkpoints, Checkpoint(plain, *tensors), is_best)

    def summarise(self) -> Summary:
        """Write the summary and the figures of what has been reached so far."""
        progress, best = self._progress, self._schedule.best
        last = self._history[-1] if self._history else None
        summary = Summary(
            finished=progress.epoch >= self._config.epochs,
            epochs=progress.epoch,
            steps=progress.step,
            accuracy=1 - last.val_top1_error if last else None,
            top5_accuracy=1 - last.val_top5_error if last else None,
            best_accuracy=1 - best if best is not None else None,
            chance=1 / len(self._facts.class_names),
            images_per_s=progress.images_per_s,
            waiting_share=progress.waiting_share,
            ledger=self._ledger(),
            checkpoint=str(self._folder.newest_checkpoint() or ""),
            log=str(self._folder.log),
            figures=[str(path) for path in figures.draw(self._folder, self._model)],
        )
        self._folder.write_summary(summary)
        return summary

    def note(self, event: str, **more: float) -> None:
        """Add a line to the log that says where the run is, and ``more``."""
        where = {"step": self._progress.step, "epoch": self._progress.epoch, "seen": self._progress.seen}
        self._folder.append({"event": event, "unix_s": time.time(), **where, **more})

    def _take_over(self, resume: Resume) -> None:
        plain = resume.saved.plain
        restore(self._model, resume.saved, resume.path)
        checkpoint.restore_random_states(resume.saved.random)
        self._progress, self._schedule = plain.progress, plain.schedule
        self._earlier, self._history = plain.ledger, list(plain.history)

    def _ledger(self) -> list[Account]:
        """Of each epoch begun, before and after a resumption; ``delivered`` counts what was trained on."""
        here = [account for account in self._feed.accounts() if account.epoch <= self._progress.epoch]
        merged = merge_accounts(self._earlier, here)
        return [
            msgspec.structs.replace(account, delivered=self._progress.seen)
            if account.epoch == self._progress.epoch
            else account
            for account in merged
            if account.epoch < self._progress.epoch or self._progress.seen
        ]

    def _read_meter(self) -> None:
        """Bring the epoch's sums up to date, and make sure that they are numbers."""
        progress = self._progress
        progress.epoch_tally = self._meter.read()
        if not math.isfinite(progress.epoch_tally.loss):
            raise self._diverged()

    def _diverged(self) -> TrainingDiverged:
        return TrainingDiverged(self._progress.step, not_finite(self._model), self._folder.newest_checkpoint())

    def _log_step(self) -> None:
        record = self._window.close(self._progress, self._optimizer.lr)
        self._window = _Window(self._progress)
        self._folder.append(record)
        self._reporter.step(record)


class _Window:
    """The steps since the last line of the log."""

    def __init__(self, progress: Progress) -> None:
        self._before = msgspec.structs.replace(progress)

    def close(self, progress: Progress, lr: float) -> StepRecord:
        before = self._before
        tally = progress.epoch_tally.since(before.epoch_tally)
        trained_s = max(progress.trained_s - before.trained_s, 1e-9)
        return StepRecord(
            step=progress.step,
            epoch=progress.epoch,
            seen=progress.seen,
            loss=tally.mean_loss,
            error=tally.error,
            lr=lr,
            images_per_s=tally.images / trained_s,
            waiting=(progress.waited_s - before.waited_s) / trained_s,
        )


def not_finite(model: AlexNet) -> str | None:
    """The name of the first parameter with a value that is no number, None if all are numbers."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return next((name for name, values in parameters.items() if not torch.isfinite(values).all()), None)
