"""The configuration of a run, with all defaults; run folders and checkpoints store it."""

from __future__ import annotations

from typing import Final

import msgspec

from trainer.errors import ConfigError
from trainer.model.ablation import Ablation
from trainer.model.presets import PresetName, preset_named
from trainer.model.rng import MAX_SEED
from trainer.model.speed import Speed
from trainer.schedule import Policy, Schedule

DEFAULT_RUNS: Final = "runs"
"""Parent of new run folders."""

MAX_BATCH: Final = 4096
"""Largest number of images in a batch; a request to a node has the same bound."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source of the batches: a running node, or a private one that the trainer starts.

    Fields:
        loader: address of a running node; None uses ``data``.
        data: dataset folder of a private node. If both are None, the trainer uses a node that answers at the default
            address, or else a private node on the default folder.
        workers: worker processes of the private node.
        server_key, client_key: key files, the node's public key and this trainer's secret key; None for a node of this
            user on this machine.
        insecure: connect without keys, to a node that was started so.
        timeout_s: seconds without a running node before the run fails; None waits without limit.
    """

    loader: str | None = None
    data: str | None = None
    workers: int = 2
    server_key: str | None = None
    client_key: str | None = None
    timeout_s: float | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.loader is not None and self.data is not None:
            raise ConfigError("--data", self.data, "no --data together with --loader: a running node has its own data")
        if self.workers < 1:
            raise ConfigError("--workers", self.workers, "at least 1")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError("--timeout", self.timeout_s, "more than 0 seconds")


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings that decide what a run computes and what it reports.

    Fields:
        preset, width, towers, seed: as in ``trainer.model.AlexNet``; the seed also decides the order of the data, every
            augmentation and every dropout mask.
        crop: side of the network's input, in pixels; None takes 7/8 of the records' side: 224 of 256.
        epochs: passes over the training split; about 90 in the paper (section 5).
        batch_size: images per batch; 128 in the paper (section 5).
        accumulate: batches per update, whose gradients are those of one batch of all their images.
        ema: decay of a moving average of the weights, between 0 and 1; None keeps none.
        lr: initial learning rate; .01 in the paper (section 5).
        schedule, patience, drop_at, warmup: learning rate schedule, as in ``trainer.schedule.Schedule``.
        devices: devices of the towers; empty takes one GPU, or the CPU of a machine without.
        checkpoint_every: steps between checkpoints within an epoch; 0 saves only at the end of each epoch.
        log_every: steps between log lines.
        deterministic: avoid kernels whose sums depend on thread timing; see ``trainer.model.speed.numerics``.
        peak_tflops: peak of one device in 1e12 operations per second, for the MFU; None looks up the device's name.
        source: source of the batches.
        ablation: differences from the paper's network and recipe. Files call it ``variation``, as version 0.1 did.
        speed: execution options of the network; a resumed run may change them.
    """

    preset: PresetName = "paper"
    width: float = 1.0
    towers: int = 2
    seed: int = 0
    crop: int | None = None
    epochs: int = 90
    batch_size: int = 128
    accumulate: int = 1
    ema: float | None = None
    lr: float = 0.01
    schedule: Policy = "plateau"
    patience: int = 5
    drop_at: tuple[int, ...] = ()
    warmup: float = 0.0
    devices: tuple[str, ...] = ()
    checkpoint_every: int = 1000
    log_every: int = 20
    deterministic: bool = False
    peak_tflops: float | None = None
    source: Source = Source()
    ablation: Ablation = msgspec.field(default=Ablation(), name="variation")
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        preset_named(self.preset)
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError("--seed", self.seed, f"0 to {MAX_SEED}")
        if not 0 < self.lr < 1:
            raise ConfigError("--lr", self.lr, "a number between 0 and 1")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise ConfigError("--batch-size", self.batch_size, f"1 to {MAX_BATCH}")
        for option, value, least in (
            ("--epochs", self.epochs, 1),
            ("--accumulate", self.accumulate, 1),
            ("--patience", self.patience, 1),
            ("--checkpoint-every", self.checkpoint_every, 0),
            ("--log-every", self.log_every, 1),
            ("--crop", 1 if self.crop is None else self.crop, 1),
        ):
            if value < least:
                raise ConfigError(option, value, f"at least {least}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError("--ema", self.ema, "a number between 0 and 1, such as .999")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError("--peak-tflops", self.peak_tflops, "more than 0")
        self.first_schedule()  # checks the options of the schedule

    def first_schedule(self) -> Schedule:
        """Return the schedule at the start of the run; raise ConfigError if its options contradict each other."""
        return Schedule(self.lr, self.schedule, self.patience, self.drop_at, self.warmup)


FIXED_FOR_A_RUN: Final = (
    "preset",
    "width",
    "towers",
    "seed",
    "crop",
    "lr",
    "schedule",
    "patience",
    "drop_at",
    "warmup",
    "ablation",
)
"""Options that a resumed run cannot change: its weights, or the meaning of the positions already seen, depend on them."""
