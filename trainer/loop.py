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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from trainer.dataset import Facts
from trainer.errors import ConfigError, TrainingDiverged
from trainer.evaluate import Member, build, evaluate, restore
from trainer.exchange import BetweenProcesses, Share
from trainer.feed import Batch, Feed, LoaderServiceError, Node, training_view
from trainer.ledger import Account, as_numbers, from_numbers, merge_accounts
from trainer.model import AlexNet
from trainer.optimizer import PaperSGD
from trainer.preset import preset_named
from trainer.progress import EpochRecord, Meter, Progress, StepRecord, Tally
from trainer.report import Reporter
from trainer.run_folder import RunFolder
from trainer.scores import Evaluation
from trainer.stop import Stopped, StopRequest
from trainer.summary import Summary
from trainer.twins import TwinFeed, share_facts
from trainer.world import World

_T = TypeVar("_T")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from, and where it lies."""

    path: Path
    saved: Checkpoint


def train(
    config: RunConfig,
    folder: RunFolder,
    node: Node | None,
    console: Console,
    stop: StopRequest,
    resume: Resume | None,
    world: World,
) -> Summary:
    """Train until the last epoch is over, or until ``stop`` is asked for.

    Args:
        config: of the run.
        folder: where its results go.
        node: which feeds it; None in a process of tower 1, which its twin feeds.
        console: where progress is shown.
        stop: asked after each step; a checkpoint is saved before leaving.
        resume: where an earlier run was left.
        world: the processes that train together; all of them call this.

    Raises:
        TrainerError: the loss is no longer a number, a device is missing, a checkpoint cannot be written, ...
        LoaderServiceError: the node cannot serve.
    """
    if config.batch_size % world.replicas:
        raise ConfigError("--batch-size", config.batch_size, f"a multiple of {world.replicas}, the number of replicas")
    with ExitStack() as stack:
        feed = stack.enter_context(_open_feed(config, node, stop, resume, world)) if node else None
        facts = share_facts(feed.facts if feed else None, world)
        reporter = stack.enter_context(Reporter(console, config.epochs, facts.count))
        training = Training(config, folder, node, feed, facts, world, reporter, stop, resume)
        try:
            training.run()
        except (Stopped, LoaderServiceError) as why:
            path = training.save()
            training.note("stop")
            reporter.say(f"Stopped at step {training.step}: {path} is where --resume auto goes on.")
            if isinstance(why, LoaderServiceError):
                raise
        return training.summarise()


def _open_feed(config: RunConfig, node: Node, stop: StopRequest, resume: Resume | None, world: World) -> Feed:
    """This replica's part of the training split."""
    state = resume.saved.plain.loader if resume else None
    with stop.interruptible():
        return Feed(
            node,
            "train",
            training_view(preset_named(config.preset), config.variation, node),
            config.batch_size // world.replicas,
            world.devices,
            config.seed,
            config.epochs,
            state,
            world.replica,
            world.replicas,
            config.crop,
        )


class Training:
    """One run: the network and everything else that a step changes."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        node: Node | None,
        feed: Feed | None,
        facts: Facts,
        world: World,
        reporter: Reporter,
        stop: StopRequest,
        resume: Resume | None,
    ) -> None:
        self._config, self._folder, self._node = config, folder, node
        self._feed, self._facts, self._world, self._reporter, self._stop = feed, facts, world, reporter, stop
        if not facts.count:
            raise ConfigError("--data", node.address if node else "", "a training split with at least one image")
        self._batches = TwinFeed(feed, world, stop)
        share = Share((world.pair.tower,), BetweenProcesses(world.pair)) if world.pair else None
        self._model = build(config, facts, world.devices, share)
        self._centre = Centre(facts.mean, self._model.preset, world.devices)
        self._schedule = config.first_schedule()
        self._progress = Progress()
        self._earlier: list[Account] = []
        self._history: list[EpochRecord] = []
        if resume:
            self._take_over(resume)
        self._optimizer = PaperSGD(self._model, self._model.preset, self._rate(), config.speed.fused_sgd)
        if resume:
            self._optimizer.load_momentum(resume.saved.momentum)
        self._meter = self._new_meter()
        self._position = feed.state() if feed else {}
        self._first_epoch = self._progress.epoch
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

    @property
    def _waited_s(self) -> float:
        return self._feed.waited_s if self._feed else 0.0

    def _new_meter(self) -> Meter:
        """One process counts from where the epoch's sums are; the sums of all are added up."""
        return Meter(self._world.devices[0], self._progress.epoch_tally if self._world.is_first else Tally())

    def _agree(self, action: Callable[[], _T]) -> _T:
        """Do something in every process; if one of them is stopped or loses its node meanwhile, all leave together.

        Raises:
            Stopped, LoaderServiceError: this process's own reason, or another's.
        """
        failure: Exception | None = None
        try:
            result = action()
        except (Stopped, LoaderServiceError) as error:
            failure = error
        leaves = failure is not None or self._stop.by is not None
        anyone = any(row[0] for row in self._world.gather([leaves]))
        if failure is not None:
            raise failure
        if anyone:
            raise Stopped
        return result

    def _obey_hand(self, wanted: float) -> None:
        """Take over a learning rate that somebody has set by hand meanwhile; 0 if nobody has.

        The request goes away only when a checkpoint holds its effect, so that a crash cannot lose it.
        """
        if not wanted:
            return
        self._schedule = self._schedule.by_hand(wanted, self._epochs_done(), self._config.epochs)
        self.note("set-lr", lr=wanted, before=self._optimizer.lr)
        self._reporter.say(f"By hand: the learning rate is {wanted:g} from step {self.step + 1} on.")
        self._optimizer.set_lr(wanted)
        self.save()
        if self._world.is_first:
            self._folder.forget_wanted_rate()

    def _train_epoch(self) -> None:
        """The steps of an epoch that have not been made yet."""
        progress, config = self._progress, self._config
        self._model.train()
        self._window = _Window(progress)
        while progress.seen < self._facts.count:
            began_s, waited_s = time.perf_counter(), self._waited_s
            batch = self._agree(lambda: next(self._batches))
            here = len(batch.labels) if self._world.has_head else 0
            wanted = self._folder.wanted_rate() if self._world.is_first else None
            said = self._world.gather([here, wanted or 0.0])
            self._obey_hand(said[0][1])
            self._step(batch, int(sum(images for images, _ in said)))
            self._position = self._feed.state() if self._feed else {}
            over = progress.seen == self._facts.count
            log_now = over or progress.step % config.log_every == 0
            save_now = not over and config.checkpoint_every > 0 and progress.step % config.checkpoint_every == 0
            if log_now or save_now:
                self._read_meter()  # before the clock: what the device still had to do is part of the steps' time
            progress.trained_s += time.perf_counter() - began_s
            progress.waited_s += self._waited_s - waited_s
            if log_now:
                self._log_step()
            if save_now:
                self.save()
        self._agree(self._stop.check)

    def _step(self, batch: Batch, total: int) -> None:
        """One update of the weights, by this process's batch and those of the other replicas: ``total`` images."""
        progress = self._progress
        self._optimizer.set_lr(self._rate())
        self._optimizer.zero_grad()
        if len(batch.labels):  # a replica's share of a short last batch may be empty
            self._learn(batch, len(batch.labels) / total)
        self._world.add_gradients(self._model)
        self._optimizer.step()
        progress.step += 1
        progress.seen += total
        progress.images += total

    def _learn(self, batch: Batch, weight: float) -> None:
        """Forward and backward: gradients of the batch's mean loss, times ``weight``."""
        images = self._centre(batch.images, batch.windows)
        logits = self._model(images, DropoutKey(self._config.seed, self._progress.step, self._world.replica))
        if not self._world.has_head:
            torch.autograd.backward(logits)  # tower 0's process has the loss
            return
        loss = functional.cross_entropy(logits, batch.labels)
        torch.autograd.backward(loss * weight)
        self._meter.add(loss, logits, batch.labels)

    def _end_epoch(self) -> None:
        """Validate, let the schedule decide on the learning rate, and save."""
        progress, lr, before = self._progress, self._optimizer.lr, self._schedule
        self._read_meter()
        result = self._agree(self._validate)
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
        self._meter = self._new_meter()
        self._log(record)
        self.save(is_best)
        self._reporter.epoch(record)
        if self._schedule.drops > before.drops:
            self._reporter.say(f"The validation error has stalled: the learning rate drops to {self._schedule.lr:g}.")
        self.summarise()

    def _validate(self) -> Evaluation:
        world, member = self._world, Member(self._model, self._centre)
        if self._node is None:
            return evaluate([member], TwinFeed(None, world, self._stop), world)
        size = self._config.batch_size // world.replicas
        with Feed(
            self._node,
            "val",
            "center",
            size,
            world.devices,
            rank=world.replica,
            world_size=world.replicas,
            crop=self._facts.crop,
        ) as feed:
            return evaluate([member], TwinFeed(feed, world, self._stop), world)

    def save(self, is_best: bool = False) -> Path:
        """Write a checkpoint of this moment and return its path; all processes take part, the first one writes.

        Raises:
            TrainingDiverged: a weight is no number: such a checkpoint would only push out good ones.
        """
        self._read_meter()
        bad = self._not_finite()
        if bad:
            raise self._diverged(bad)
        model = self._world.bring_together(self._model.state_dict())
        momentum = self._world.bring_together(self._optimizer.momentum())
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
            crop=self._facts.crop,
        )
        if not self._world.is_first:
            return checkpoint.path_of(self._folder.checkpoints, self.step)
        whole = Checkpoint(plain, model, momentum, self._facts.mean, checkpoint.random_states())
        return checkpoint.save(self._folder.checkpoints, whole, is_best)

    def summarise(self) -> Summary:
        """Write the summary and the figures of what has been reached so far; all take part, the first process writes."""
        progress, best, first = self._progress, self._schedule.best, self._world.is_first
        kernels = self._world.bring_together(
            {name: weights for name, weights in self._model.state_dict().items() if name.endswith("conv1.weight")}
        )
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
            figures=[str(path) for path in figures.draw(self._folder, list(kernels.values()))] if first else [],
        )
        if first:
            self._folder.write_summary(summary)
        return summary

    def note(self, event: str, **more: float) -> None:
        """Add a line to the log that says where the run is, and ``more``."""
        where = {"step": self._progress.step, "epoch": self._progress.epoch, "seen": self._progress.seen}
        self._log({"event": event, "unix_s": time.time(), **where, **more})

    def _take_over(self, resume: Resume) -> None:
        plain = resume.saved.plain
        restore(self._model, resume.saved, resume.path)
        checkpoint.restore_random_states(resume.saved.random)
        self._progress, self._schedule = plain.progress, plain.schedule
        self._earlier, self._history = plain.ledger, list(plain.history)

    def _ledger(self) -> list[Account]:
        """Of each epoch begun, before and after a resumption; ``delivered`` counts what was trained on."""
        mine = self._feed.accounts() if self._feed else []
        epochs = range(self._first_epoch, self._progress.epoch + 1)
        everyone = self._world.gather(as_numbers(mine, epochs))
        merged = merge_accounts(self._earlier, from_numbers(everyone, epochs))
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
        everyone = self._world.gather(msgspec.structs.astuple(self._meter.read()))
        progress.epoch_tally = Tally(*(sum(column) for column in zip(*everyone, strict=True)))
        if not math.isfinite(progress.epoch_tally.loss):
            raise self._diverged(self._not_finite())

    def _diverged(self, layer: str | None) -> TrainingDiverged:
        return TrainingDiverged(self._progress.step, layer, self._folder.newest_checkpoint())

    def _not_finite(self) -> str | None:
        """The first parameter of any process with a value that is no number, None if all are numbers."""
        names = [name for name, _ in self._model.named_parameters()]
        mine = not_finite(self._model)
        said = self._world.gather([names.index(mine) if mine else -1])
        bad = [(rank, int(index)) for rank, (index,) in enumerate(said) if index >= 0]
        if not bad:
            return None
        rank, index = bad[0]
        # Towers have the same names but for their number; fc8, which stands last, is tower 0's alone.
        name = names[index] if index < len(names) else "fc8"
        return f"towers.{rank % 2}.{name.split('.', 2)[2]}" if self._world.pair and name.startswith("towers.") else name

    def _log(self, record: msgspec.Struct | dict[str, Any]) -> None:
        """Add a line to the log; the first process's is everyone's."""
        if self._world.is_first:
            self._folder.append(record)

    def _log_step(self) -> None:
        record = self._window.close(self._progress, self._optimizer.lr)
        self._window = _Window(self._progress)
        self._log(record)
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
