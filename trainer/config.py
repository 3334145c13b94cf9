"""The one place of every default of the trainer, and the configuration that a run folder and a checkpoint carry."""

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
"""Where new run folders go."""

MAX_BATCH: Final = 4096
"""The most images in an update; a request to a node has the same bound."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where batches come from.

    Fields:
        loader: address of a running node; None asks ``data``.
        data: folder of a private node. With neither, a node at the usual address serves, or else a private one on the
            usual folder.
        workers: worker processes of a private node.
        server_key, client_key: files of a remote node's public key and this trainer's secret one; None for nodes that
            need none.
        timeout_s: how long a running node may be away before that is an error; None waits for it, and says so.
    """

    loader: str | None = None
    data: str | None = None
    workers: int = 2
    server_key: str | None = None
    client_key: str | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.loader is not None and self.data is not None:
            raise ConfigError("--data", self.data, "no --data beside --loader: a running node has its own")
        if self.workers < 1:
            raise ConfigError("--workers", self.workers, "at least 1")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError("--timeout", self.timeout_s, "more than 0 seconds")


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides what a run computes, and how it reports.

    Fields:
        preset, width, towers, seed: the network's, as in ``trainer.model.alexnet.AlexNet``; the seed also decides the order of
            the data and every augmentation and dropout mask.
        crop: side of what the network sees of a record, in pixels; None takes 7/8 of the record's, 224 of 256.
        epochs: passes over the training split; 90 in the paper.
        batch_size: images per update; 128 in the paper.
        lr: learning rate at the start; .01 in the paper.
        schedule, patience, drop_at, warmup: of the learning rate, as in ``trainer.schedule.Schedule``.
        devices: where the towers live; empty means what the machine has.
        checkpoint_every: steps between checkpoints within an epoch; 0 leaves those at each epoch's end.
        log_every: steps between log lines.
        deterministic: whether kernels whose sums come out otherwise each time are left out; see ``trainer.model.speed.deterministic``.
        peak_tflops: what one of the devices can do per second, in 1e12 operations, for the share of it that is used; None
            looks its name up.
        source: where batches come from.
        ablation: what differs from the paper's network and recipe; files name it ``variation``, as version 0.1 did.
        speed: how the network is run; a resumed run may change it.
    """

    preset: PresetName = "paper"
    width: float = 1.0
    towers: int = 2
    seed: int = 0
    crop: int | None = None
    epochs: int = 90
    batch_size: int = 128
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
            ("--patience", self.patience, 1),
            ("--checkpoint-every", self.checkpoint_every, 0),
            ("--log-every", self.log_every, 1),
            ("--crop", 1 if self.crop is None else self.crop, 1),
        ):
            if value < least:
                raise ConfigError(option, value, f"at least {least}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError("--peak-tflops", self.peak_tflops, "more than 0")
        self.first_schedule()

    def first_schedule(self) -> Schedule:
        """The schedule that a run starts with; ConfigError if there can be no such one."""
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
"""What a resumed run cannot change: the weights, or the meaning of the positions already seen, hang on it."""
