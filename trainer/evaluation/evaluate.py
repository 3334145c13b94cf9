"""Errors on a split, as the paper reports them (section 6): top-1 and top-5, from one crop or ten, from one net or several.

The softmax outputs are averaged, over the views of a picture (section 4.1) and over the networks (table 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.feed import DeviceBatch, Endpoint, Feed
from trainer.data.normalisation import Facts, MeanSubtraction, Windows
from trainer.errors import ConfigError
from trainer.evaluation.scores import Evaluation, ScoreCounter
from trainer.model.alexnet import AlexNet
from trainer.model.speed import REFERENCE
from trainer.parallel.devices import choose_device
from trainer.parallel.world import World
from trainer.run import checkpoint
from trainer.run.folder import find_checkpoint
from trainer.run.state import build_network, restore_weights

VIEWS_PER_RECORD: Final = {"center": 1, "ten-crop": 10}
VIEWS: Final = tuple(VIEWS_PER_RECORD)
"""How a picture is looked at: its centre crop, or four corners and the centre, and their mirror images."""


@dataclass(frozen=True)
class Member:
    """One network of those whose outputs are averaged, and how it wants its input centred."""

    model: AlexNet
    subtract_mean: MeanSubtraction

    def probabilities(self, images: Sequence[Tensor], windows: Windows, views: int) -> Tensor:
        """Softmax outputs, averaged over the views of each record.

        Args:
            images: for each device (B V, S, S, 3) uint8.
            windows: where the B V pictures were cut.
            views: V.

        Returns:
            (B, classes) float32 on the first device.
        """
        logits: Tensor = self.model(self.subtract_mean(images, windows))
        if not logits.dim():
            return logits  # of a process without tower 0
        probabilities = functional.softmax(logits.float(), dim=1)
        return probabilities.view(-1, views, probabilities.shape[1]).mean(1)


def evaluate(members: Sequence[Member], batches: Iterable[DeviceBatch], world: World | None = None) -> Evaluation:
    """Run the networks over all batches and compare with the labels.

    Of several processes each has its part of the batches; the result is of all of them.
    """
    for member in members:
        member.model.eval()
    counter = ScoreCounter()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch.labels):
                continue
            outputs = [member.probabilities(batch.images, batch.windows, batch.views) for member in members]
            if world and not world.has_head:
                continue  # tower 0's process has the outputs
            counter.add(torch.stack(outputs).mean(0), batch.labels)
    return counter.evaluation(world)


def evaluate_runs(
    paths: Sequence[Path], node: Endpoint, views: str, batch_size: int, devices: Sequence[str]
) -> tuple[Evaluation, tuple[str, ...]]:
    """Errors on the validation split of several runs' networks, their outputs averaged.

    Args:
        paths: run folders or checkpoint files.
        node: which serves the split.
        views: one of VIEWS.
        batch_size: pictures per batch, each view counted.
        devices: at most one; empty means what the machine has.

    Returns:
        The errors, and the names of the classes.

    Raises:
        ConfigError: networks that were trained on other classes, or on records or crops of other sides.
        TrainerError: otherwise, a checkpoint or device that cannot be used.
        LoaderServiceError: the node cannot serve.
    """
    device = choose_device(devices)
    loaded = [load_member(path, device) for path in paths]
    records = max(1, batch_size // VIEWS_PER_RECORD[views])
    with Feed(node, "val", views, records, (device,), crop=loaded[0][1].crop) as feed:
        sees = (len(feed.facts.mean), feed.facts.crop)
        for path, (_, facts) in zip(paths, loaded, strict=True):
            if facts.class_names != feed.facts.class_names:
                raise ConfigError("RUN", path, "a network of the same classes as the validation split's")
            if (len(facts.mean), facts.crop) != sees:
                raise ConfigError("RUN", path, f"a network for records of {sees[0]} pixels and crops of {sees[1]}")
        return evaluate([member for member, _ in loaded], feed), feed.facts.class_names


def load_member(path: Path, device: torch.device) -> tuple[Member, Facts]:
    """The network of a run's newest checkpoint, or of a checkpoint file, ready for use on one device, in float32.

    Returns:
        The network, and the training split it knows.

    Raises:
        CheckpointError, RunFolderError: there is none, or it is damaged.
    """
    path = find_checkpoint(path)
    saved = checkpoint.load(path)
    config, facts = msgspec.structs.replace(saved.plain.config, speed=REFERENCE), saved.facts
    model = build_network(config, facts, (device,))
    restore_weights(model, saved, path)
    return Member(model.eval(), MeanSubtraction(facts.mean, model.preset, (device,))), facts
