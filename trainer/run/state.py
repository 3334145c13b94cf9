"""The state of a training: all that its steps change and its checkpoints store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loader_service.types import EpochAccount
from trainer.config import RunConfig
from trainer.data.normalisation import Facts
from trainer.ema import MovingAverage
from trainer.errors import CheckpointError
from trainer.model.alexnet import AlexNet
from trainer.optimizer import PaperSGD
from trainer.parallel.exchange import BetweenProcesses, Share
from trainer.parallel.world import World
from trainer.run import checkpoint, format_1
from trainer.run.checkpoint import Checkpoint
from trainer.run.progress import EpochRecord, Progress
from trainer.schedule import Schedule


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, and its path."""

    path: Path
    checkpoint: Checkpoint


@dataclass
class State:
    """The state of one process between two steps.

    Fields:
        config: configuration of the run.
        facts: facts about the training split.
        model, optimizer: this process's part of the network, and its momentum.
        ema: moving average of the weights; None without --ema.
        schedule: learning rate schedule.
        progress: counters of the run.
        loader: position of the first sample that has not been trained on.
        earlier_accounts: accounts of the epochs before this process started.
        history: results of the epochs that have ended.
    """

    config: RunConfig
    facts: Facts
    model: AlexNet
    optimizer: PaperSGD
    ema: MovingAverage | None
    schedule: Schedule
    progress: Progress
    loader: dict[str, Any]
    earlier_accounts: list[EpochAccount]
    history: list[EpochRecord]

    @classmethod
    def begin(cls, config: RunConfig, facts: Facts, world: World, resume: Resume | None) -> State:
        """Return the state of a new training, or of one resumed from a checkpoint.

        Raises:
            CheckpointError: the checkpoint does not fit the network, or its velocities cannot be told.
        """
        # None: all towers live in this process.
        share = Share((world.pair.tower,), BetweenProcesses(world.pair)) if world.pair else None
        model = build_network(config, facts, world.devices, share)
        schedule, progress = config.first_schedule(), Progress()
        earlier_accounts: list[EpochAccount] = []
        history: list[EpochRecord] = []
        if resume:
            plain = resume.checkpoint.plain
            restore_weights(model, resume.checkpoint, resume.path)
            checkpoint.restore_random_states(resume.checkpoint.random)
            schedule, progress, earlier_accounts, history = (
                plain.schedule,
                plain.progress,
                plain.ledger,
                list(plain.history),
            )
        optimizer = PaperSGD(model, model.preset, config.lr, bool(model.speed.fused_sgd))
        ema = MovingAverage(model, config.ema) if config.ema is not None else None
        state = cls(config, facts, model, optimizer, ema, schedule, progress, {}, earlier_accounts, history)
        if resume:
            optimizer.load_momentum(saved_velocities(model, resume))
            if ema:
                ema.load(resume.checkpoint.ema)  # empty if --ema is new: the average starts here
        optimizer.set_lr(state.rate)
        return state

    @property
    def epochs_done(self) -> float:
        """Epochs completed, with the fraction of the current one."""
        return self.progress.epoch + self.progress.seen / self.facts.count

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.schedule.rate(self.epochs_done, self.config.epochs)


def build_network(
    config: RunConfig, facts: Facts, devices: Sequence[torch.device], share: Share | None = None
) -> AlexNet:
    """Return the network that a configuration describes, for a split's classes and crops, with initial weights."""
    return AlexNet(
        num_classes=len(facts.class_names),
        width=config.width,
        preset=config.preset,
        devices=devices,
        towers=config.towers,
        seed=config.seed,
        ablation=config.ablation,
        share=share,
        crop=facts.crop,
        speed=config.speed,
    )


def saved_velocities(model: AlexNet, resume: Resume) -> dict[str, Tensor]:
    """Return the velocities v in a checkpoint of any format, by parameter name, for the parameters of ``model``.

    Raises:
        CheckpointError: a file of format 1 does not tell the rate of its last step.
    """
    saved = resume.checkpoint
    own = {name: tensor for name, tensor in saved.momentum.items() if model.owns(name)}
    return own if saved.format > 1 else format_1.velocities(own, saved.plain, resume.path, model.preset)


def restore_weights(model: AlexNet, saved: Checkpoint, path: Path, ema: bool = False) -> None:
    """Load the weights of a checkpoint into ``model``, or with ``ema`` their moving average.

    Raises:
        CheckpointError: the weights belong to another network, or there is no average.
    """
    if ema and not saved.ema:
        raise CheckpointError(path, "it has no moving average of the weights; trainer run --ema makes one")
    weights = saved.ema if ema else saved.model
    try:
        # Other processes restore their own towers.
        model.load_state_dict({name: tensor for name, tensor in weights.items() if model.owns(name)})
    except RuntimeError as error:
        raise CheckpointError(path, "its weights do not fit the network that it describes") from error
