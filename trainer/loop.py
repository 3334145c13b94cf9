"""The training loop: epochs of steps, a validation after each epoch, and checkpoints.

``Training._train_step`` shows a whole step. It changes ``trainer.run.state.State``; ``trainer.run.recorder.Recorder``
writes log, checkpoints and summary. Rules of the file:

1. The loader's position is read after a step is complete, so a checkpoint neither skips an image nor repeats one.
2. An epoch is complete when all of its positions have been trained on and the validation is done. A run stopped between
   the two validates when it resumes.
3. All processes of a run take the same path through this file: before one of them leaves, it informs the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TypeVar

import msgspec
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from trainer.config import RunConfig
from trainer.data.feed import Endpoint, Feed, LoaderServiceError, training_view
from trainer.data.normalisation import MeanSubtraction, Windows
from trainer.data.paired_feed import PairedFeed, share_facts
from trainer.errors import ConfigError
from trainer.evaluation.evaluate import Member, evaluate
from trainer.evaluation.scores import Evaluation
from trainer.model.dropout import MaskPlan
from trainer.model.flops import TERA, peak_flops, training_flops
from trainer.model.presets import preset_named
from trainer.model.rng import DropoutKey
from trainer.model.speed import numerics
from trainer.parallel.devices import out_of_memory_error
from trainer.parallel.exchange import Timed
from trainer.parallel.gradients import GradientSum
from trainer.parallel.world import World
from trainer.run.console import Reporter
from trainer.run.divergence import DivergenceMonitor, start_warning
from trainer.run.folder import RunFolder
from trainer.run.profiler import StepProfiler
from trainer.run.progress import EpochRecord, LogInterval, Meter, Tally, sums_of
from trainer.run.recorder import Event, Recorder
from trainer.run.state import Resume, State
from trainer.run.step_clock import Phase, StepClock
from trainer.run.summary import Summary
from trainer.stop import Stopped, StopRequest

_T = TypeVar("_T")


def train(
    config: RunConfig,
    folder: RunFolder,
    node: Endpoint | None,
    console: Console,
    stop: StopRequest,
    resume: Resume | None,
    world: World,
    profiled_steps: int = 0,
) -> Summary:
    """Train until the last epoch is complete or a stop is requested.

    Args:
        config: configuration of the run.
        folder: folder of its results.
        node: node that feeds this process; None in a process of tower 1.
        console: terminal or file that shows progress.
        stop: stop request, checked after each step; a checkpoint is saved before this returns.
        resume: checkpoint of an earlier run; None starts a new one.
        world: processes that train together; all of them call this function.
        profiled_steps: steps that the first process records into RUN/trace.json; 0 for none.

    Returns:
        The summary of the run, also in RUN/summary.json.

    Raises:
        TrainerError: the loss is not finite or has exploded, a device is missing or too small, the last checkpoint cannot
            be written, or another process has died.
        LoaderServiceError: the node cannot serve.
    """
    if config.batch_size % world.replicas:
        raise ConfigError("--batch-size", config.batch_size, f"a multiple of {world.replicas}, the number of replicas")
    with ExitStack() as stack:
        stack.enter_context(numerics(config.deterministic))  # before the peak is looked up, which depends on it
        feed = stack.enter_context(_open_feed(config, node, stop, resume, world)) if node else None
        facts = share_facts(feed.facts if feed else None, world)
        if not facts.count:
            raise ConfigError("--data", node.address if node else "", "a training split with at least one image")
        state = State.begin(config, facts, world, resume)
        reporter = stack.enter_context(Reporter(console, config.epochs, facts.count))
        recorder = stack.enter_context(Recorder(folder, state, world, feed.accounts if feed else list, reporter))
        profiled = profiled_steps if world.is_first else 0
        profiler = stack.enter_context(StepProfiler(folder.trace, profiled, reporter.say))
        training = Training(state, recorder, folder, node, feed, world, reporter, stop, profiler)
        recorder.note(Event.RESUME if resume else Event.START)
        out_of_memory = False
        try:
            training.run()
        except torch.cuda.OutOfMemoryError:
            out_of_memory = True  # the traceback holds the batch's tensors, which are free only after this block
        except (Stopped, LoaderServiceError) as why:
            training.save()
            path = recorder.finish()
            recorder.note(Event.STOP)
            reporter.say(
                f"Stopped at step {state.progress.step}. To continue from {path}, run the same command with --resume auto."
            )
            if isinstance(why, LoaderServiceError):
                raise
        if out_of_memory:
            alone = world.size == 1
            raise out_of_memory_error(
                config.batch_size // world.replicas, world.devices, training.try_batch if alone else None
            )
        recorder.finish()
        return recorder.summarise()


def _open_feed(config: RunConfig, node: Endpoint, stop: StopRequest, resume: Resume | None, world: World) -> Feed:
    """Open this replica's part of the training split."""
    state = resume.checkpoint.plain.loader if resume else None
    with stop.interruptible():
        return Feed(
            node,
            "train",
            training_view(preset_named(config.preset), config.ablation, node),
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
    """The training of one process.

    Args:
        state: network, optimiser and counters.
        recorder: writer of log, checkpoints and summary.
        folder: run folder, which holds a learning rate set by hand.
        node, feed: source of the images; None in a process of tower 1.
        world: all processes of the run.
        reporter: progress display.
        stop: stop request, checked after each step.
        profiler: profiler, informed after each step.
    """

    def __init__(
        self,
        state: State,
        recorder: Recorder,
        folder: RunFolder,
        node: Endpoint | None,
        feed: Feed | None,
        world: World,
        reporter: Reporter,
        stop: StopRequest,
        profiler: StepProfiler,
    ) -> None:
        self._profiler = profiler
        self._state, self._recorder, self._folder, self._node = state, recorder, folder, node
        self._feed, self._world, self._reporter, self._stop = feed, world, reporter, stop
        self._batches = PairedFeed(feed, world, stop, _mask_plan(state, world))
        self._subtract_mean = MeanSubtraction(state.facts.mean, state.model.preset, world.devices)
        self._divisor = state.model.preset.jittered_divisor if state.config.ablation.jitter else 1.0
        self._gradients = GradientSum(state.model, world.data)
        self._clock = StepClock(world.devices[0])
        state.model.exchange = Timed(state.model.exchange, self._clock)
        self._meter = self._new_meter()
        self._divergence = DivergenceMonitor(state, world)
        self._flops = training_flops(
            state.model.sizes, len(state.facts.class_names), state.facts.crop, state.config.ablation.pooling
        )
        self._peak = _peak_of_all(state.config, world)
        self._interval = self._new_interval()
        self._applied_rate = 0.0  # the request by ``trainer set-lr`` that is in effect; 0 for none
        self._requested_rate: float | None = None  # the request last read; None before the first reading
        state.loader = feed.state() if feed else {}  # a stop before the first step saves it

    def run(self) -> None:
        """Train the remaining epochs."""
        while self._state.progress.epoch < self._state.config.epochs:
            self._train_epoch()
            self._end_epoch()
        self._recorder.note(Event.END)

    def save(self, is_best: bool = False) -> None:
        """Start writing a checkpoint of the current state; all processes call this.

        Raises:
            TrainingDiverged: the state is damaged; its checkpoint would replace a good one.
        """
        self._read_meter()
        with self._clock.during(Phase.SAVING):
            self._recorder.save(is_best, self._applied_rate)

    def try_batch(self, images: int) -> None:
        """Compute and apply the gradients of ``images`` black images, for the memory that it takes.

        It spoils the weights. Call it in a run of one process, which has all towers.
        """
        state, devices, crop = self._state, self._world.devices, self._state.facts.crop
        pixels = [torch.zeros(images, crop, crop, 3, dtype=torch.uint8, device=device) for device in devices]
        windows = [Windows.centre(images, len(state.facts.mean), crop, device) for device in devices]
        labels = torch.zeros(images, dtype=torch.int64, device=devices[0])
        state.model.train()
        state.optimizer.zero_grad()
        logits = state.model(self._subtract_mean(pixels, windows), DropoutKey(state.config.seed, state.progress.step))
        torch.autograd.backward(functional.cross_entropy(logits, labels))
        state.optimizer.step()

    @property
    def _waited_s(self) -> float:
        return self._feed.waited_s if self._feed else 0.0

    def _new_meter(self) -> Meter:
        """Return a meter of this epoch; the sums of all processes add up to the epoch's, so only one starts from them."""
        start = self._state.progress.epoch_tally if self._world.is_first else Tally()
        return Meter(self._world.devices[0], start)

    def _new_interval(self) -> LogInterval:
        return LogInterval(self._state.progress, self._flops, self._peak)

    def _agree(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` in every process; if one of them is stopped or loses its node, all leave together.

        Raises:
            LoaderServiceError: this process lost its node.
            Stopped: a stop was requested, or another process leaves.
        """
        failure: Exception | None = None
        try:
            result = action()
        except (Stopped, LoaderServiceError) as error:
            failure = error
        leaves = failure is not None or self._stop.received is not None
        anyone_leaves = any(row[0] for row in self._world.gather([leaves]))
        if failure is not None:
            raise failure
        if anyone_leaves:
            raise Stopped
        return result

    def _read_requested_rate(self) -> float:
        """Return the learning rate requested by ``trainer set-lr``, 0 for none; in the first process only.

        The file is read before the first step and every ``log_every`` steps: the steps between open no file, which may be
        on a network's disk.
        """
        if not self._world.is_first:
            return 0.0
        if self._requested_rate is None or self._state.progress.step % self._state.config.log_every == 0:
            self._requested_rate = self._folder.requested_rate() or 0.0
        return self._requested_rate

    def _apply_rate_by_hand(self, requested: float) -> None:
        """Apply a learning rate requested by ``trainer set-lr``; 0 means no request.

        A request stays in the run folder until a checkpoint includes it, so a crash cannot lose it. Every step passes it
        on; only the first one applies it.
        """
        if requested == self._applied_rate:
            return
        self._applied_rate = requested
        if not requested:
            return
        state = self._state
        state.schedule = state.schedule.by_hand(requested, state.epochs_done, state.config.epochs)
        self._recorder.note(Event.SET_LR, lr=requested, before=state.optimizer.lr)
        self._reporter.say(f"Learning rate set by hand: {requested:g} from step {state.progress.step + 1}.")
        state.optimizer.set_lr(requested)
        self.save()

    def _train_epoch(self) -> None:
        """Make the steps of this epoch that have not been made yet."""
        self._state.model.train()
        self._interval = self._new_interval()
        while self._state.progress.seen < self._state.facts.count:
            self._train_step()
            self._profiler.step()
        self._agree(self._stop.check)

    def _train_step(self) -> None:
        """Make one whole step, from the batch to the decision on log and checkpoint.

        Shapes: B images in this process's batch, M in the update of all replicas, S the side of a crop in pixels.
        """
        state, world, config, progress = self._state, self._world, self._state.config, self._state.progress
        clock = self._clock
        clock.begin_step()
        began_s, waited_before_s = time.perf_counter(), self._waited_s
        # M: 128 in the paper, fewer at an epoch's end; the images of one batch, or with --accumulate of several.
        images_total = min(config.accumulate * config.batch_size, state.facts.count - progress.seen)
        images_before = 0  # of this process and update
        sums: list[Tensor] = []  # of each batch, on the device: nothing waits for them here

        batches = -(-images_total // config.batch_size)
        for number in range(batches):
            # Fetch the batch: for each device (B, S, S, 3) uint8. All processes leave here together if one of them was
            # stopped or lost its node, before any of them enters a collective of NCCL. An update that has begun is then
            # given up: nothing below has counted its images yet.
            clock.switch(Phase.WAITING)
            batch = self._agree(lambda: next(self._batches))
            clock.switch(Phase.COPY)

            if number == 0:
                # Agree with the other processes on the learning rate set by hand. Rank 0 reads it, because the others
                # could read the file a moment later.
                self._apply_rate_by_hand(world.gather([self._read_requested_rate()])[0][0])
                # It may change with every step, by warm-up or cosine.
                state.optimizer.set_lr(state.rate)
                state.optimizer.zero_grad()

            # A replica's part of a short last batch may be empty; that process only takes part in the exchange.
            if len(batch.labels):
                images = self._subtract_mean(batch.images, batch.windows)  # for each device (B, 3, S, S) float32
                if self._divisor != 1.0:
                    torch._foreach_div_(images, self._divisor)  # preset "original", in training alone
                clock.switch(Phase.FORWARD)
                dropout = batch.dropout(DropoutKey(config.seed, progress.step, world.replica, images_before))
                logits = state.model(images, dropout)  # (B, classes) float32; a zero, (), where fc8 lives elsewhere
                if world.has_head:
                    loss = functional.cross_entropy(logits, batch.labels)  # (), mean over B
                    sums.append(sums_of(loss, logits, batch.labels))
                    # Gradients of batches and replicas are added, so B / M makes their sum the gradient of the mean over
                    # all M images.
                    start = loss * (len(batch.labels) / images_total)
                else:
                    start = logits  # the gradient comes from tower 0's process
                clock.switch(Phase.BACKWARD)
                # The replicas' sum begins within the backward pass of the update's last batch.
                with nullcontext() if number == batches - 1 else self._gradients.held():
                    torch.autograd.backward(start)
            images_before += len(batch.labels)
            del batch  # on a CPU its images are the loader's memory

        # Await the sum of the replicas' gradients, which the last backward pass began, then update:
        # v <- .9 v - .0005 lr w - lr g; w <- w + v (paper section 5).
        clock.switch(Phase.EXCHANGE)
        self._gradients.finish()
        clock.switch(Phase.UPDATE)
        state.optimizer.step()
        if state.ema:
            state.ema.update(progress.step + 1)
        clock.end_step()

        # Count. Only now does the loader's position move: a checkpoint never counts an image without its update.
        progress.step += 1
        progress.seen += images_total
        progress.images += images_total
        progress.lr = state.optimizer.lr
        for row in sums:
            self._meter.add_sums(row)
        state.loader = self._feed.state() if self._feed else {}

        # Decide on log and checkpoint. The end of an epoch has its own checkpoint, after the validation.
        is_last = progress.seen == state.facts.count
        log_now = is_last or progress.step % config.log_every == 0
        save_now = not is_last and config.checkpoint_every > 0 and progress.step % config.checkpoint_every == 0
        if log_now or save_now:
            self._read_meter()  # waits for the device, whose queued work belongs to the time of these steps
        progress.trained_s += time.perf_counter() - began_s
        progress.waited_s += self._waited_s - waited_before_s
        if log_now:
            record = self._interval.close(progress, state.optimizer.lr)
            self._recorder.step(record, self._divergence.param_stats, clock.read(progress.step))
            if warning := start_warning(record, self._interval.first_step, len(state.facts.class_names)):
                self._recorder.note(Event.NOT_STARTED, loss=record.loss)
                self._reporter.say(warning)
            self._interval = self._new_interval()
        if save_now:
            self.save()

    def _end_epoch(self) -> None:
        """Validate, update the learning rate schedule, and save."""
        state, progress = self._state, self._state.progress
        before = state.schedule
        self._read_meter()
        average = None
        with self._clock.during(Phase.VALIDATING):
            result = self._agree(self._validate)
            if state.ema:
                with state.ema.in_use():
                    average = self._agree(self._validate)
        record = EpochRecord(
            epoch=progress.epoch,
            step=progress.step,
            loss=progress.epoch_tally.mean_loss,
            error=progress.epoch_tally.error,
            val_loss=result.loss,
            val_top1_error=result.top1_error,
            val_top5_error=result.top5_error,
            lr=progress.lr or state.optimizer.lr,  # of the last step, which may lie before a resume
            ema_val_loss=average.loss if average else None,
            ema_val_top1_error=average.top1_error if average else None,
            ema_val_top5_error=average.top5_error if average else None,
        )
        is_best = state.schedule.improves(result.top1_error)
        state.schedule = state.schedule.after_epoch(result.top1_error)
        state.history.append(record)
        progress.start_next_epoch()  # before the save: a resumed run must not validate again
        self._meter, self._interval = self._new_meter(), self._new_interval()
        self._recorder.epoch(record)
        self.save(is_best)
        self._recorder.time(self._clock.read(progress.step))
        if state.schedule.drops > before.drops:
            self._reporter.say(
                f"The validation error has stopped improving: the learning rate drops to {state.schedule.lr:g}."
            )
        self._recorder.summarise()

    def _validate(self) -> Evaluation:
        """Evaluate the centre crops of the validation split; replicas share its batches."""
        world, member = self._world, Member(self._state.model, self._subtract_mean)
        if self._node is None:
            return evaluate([member], PairedFeed(None, world, self._stop), world)
        size = self._state.config.batch_size // world.replicas
        with Feed(
            self._node,
            "val",
            "center",
            size,
            world.devices,
            rank=world.replica,
            world_size=world.replicas,
            crop=self._state.facts.crop,
        ) as feed:
            return evaluate([member], PairedFeed(feed, world, self._stop), world)

    def _read_meter(self) -> None:
        """Update the epoch's sums over all processes, and check for divergence; waits for the device."""
        progress = self._state.progress
        rows = self._world.gather(msgspec.structs.astuple(self._meter.read()))  # [loss, wrong, images] of each rank
        progress.epoch_tally = Tally(*(sum(column) for column in zip(*rows, strict=True)))
        self._divergence.check(self._interval.tally(progress), self._recorder.newest)


def _mask_plan(state: State, world: World) -> MaskPlan:
    """Return the masks of the batches still to come, with the keys that ``Training._train_step`` will ask for."""
    config, progress, count = state.config, state.progress, state.facts.count
    return MaskPlan(
        first=DropoutKey(config.seed, progress.step, world.replica),
        units=state.model.dropout_units(),
        accumulate=config.accumulate,
        images=config.batch_size // world.replicas,
        left=-(-(count - progress.seen) // config.batch_size),
        per_epoch=-(-count // config.batch_size),
    )


def _peak_of_all(config: RunConfig, world: World) -> float | None:
    """Return the peak FLOP/s of all processes' devices together; None if one of them is unknown."""
    dtype = torch.bfloat16 if config.speed.amp == "bf16" else torch.float32
    by_hand = (config.peak_tflops or 0.0) * TERA * len(set(world.devices))
    mine = by_hand or peak_flops(world.devices, dtype)
    peaks = [row[0] for row in world.gather([mine or 0.0])]
    return sum(peaks) if all(peaks) else None
