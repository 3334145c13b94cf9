"""Evaluation on a split as in the paper (section 6): top-1 and top-5 error of one or several networks, on one or ten crops.

Softmax outputs are averaged over the crops of an image (section 4.1) and over the networks (table 2).
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
"""Crops of each image: the centre, or the four corners, the centre, and their mirror images (paper section 4.1)."""


@dataclass(frozen=True)
class Member:
    """One network of an ensemble, with the normalisation of its input."""

    model: AlexNet
    subtract_mean: MeanSubtraction

    def probabilities(self, images: Sequence[Tensor], windows: Sequence[Windows], views: int) -> Tensor:
        """Return softmax outputs, averaged over the crops of each record.

        Args:
            images: for each device (B V, S, S, 3) uint8.
            windows: for each device positions of the B V crops.
            views: V, crops of each record.

        Returns:
            (B, classes) float32 on the first device.
        """
        logits: Tensor = self.model(self.subtract_mean(images, windows))  # (B V, classes)
        if not logits.dim():
            return logits  # (), in a process without tower 0
        probabilities = functional.softmax(logits.float(), dim=1)
        return probabilities.view(-1, views, probabilities.shape[1]).mean(1)


def evaluate(members: Sequence[Member], batches: Iterable[DeviceBatch], world: World | None = None) -> Evaluation:
    """Evaluate the averaged outputs of the networks on all batches.

    Several processes each take a part of the batches; the result covers all of them.
    """
    for member in members:
        member.model.eval()
    counter = ScoreCounter()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch.labels):
                continue  # this rank's part of a short last batch
            outputs = [member.probabilities(batch.images, batch.windows, batch.views) for member in members]
            if world and not world.has_head:
                continue  # tower 0's process has the outputs
            counter.add(torch.stack(outputs).mean(0), batch.labels)  # (B, classes), the mean over networks
    return counter.evaluation(world)


def evaluate_runs(
    paths: Sequence[Path],
    node: Endpoint,
    views: str,
    batch_size: int,
    devices: Sequence[str],
    best: bool = False,
    ema: bool = False,
) -> tuple[Evaluation, tuple[str, ...]]:
    """Evaluate the averaged outputs of several runs' networks on the validation split.

    Args:
        paths: run folders or checkpoint files.
        node: node that serves the split.
        views: one of VIEWS.
        batch_size: images per batch; every crop counts.
        devices: at most one name; empty takes what the machine has.
        best: take each folder's checkpoint of the lowest validation error, not its newest.
        ema: take the moving averages of the weights.

    Returns:
        The evaluation, and the names of the classes.

    Raises:
        ConfigError: a network was trained on other classes, or on records or crops of another side.
        TrainerError: a checkpoint or device cannot be used.
        LoaderServiceError: the node cannot serve.
    """
    device = choose_device(devices)
    loaded = [load_member(path, device, best, ema) for path in paths]
    records = max(1, batch_size // VIEWS_PER_RECORD[views])
    with Feed(node, "val", views, records, (device,), crop=loaded[0][1].crop) as feed:
        sides = (len(feed.facts.mean), feed.facts.crop)
        for path, (_, facts) in zip(paths, loaded, strict=True):
            if facts.class_names != feed.facts.class_names:
                raise ConfigError("RUN", path, "a network of the same classes as the validation split's")
            if (len(facts.mean), facts.crop) != sides:
                raise ConfigError("RUN", path, f"a network for records of {sides[0]} pixels and crops of {sides[1]}")
        return evaluate([member for member, _ in loaded], feed), feed.facts.class_names


def load_member(path: Path, device: torch.device, best: bool = False, ema: bool = False) -> tuple[Member, Facts]:
    """Load the network of a run's newest or best checkpoint, or of a checkpoint file, onto one device, in float32.

    With ``ema`` its weights are the moving average.

    Returns:
        The network in evaluation mode, and the facts about its training split.

    Raises:
        CheckpointError, RunFolderError: there is no checkpoint, or it is damaged.
    """
    path = find_checkpoint(path, best)
    saved = checkpoint.load(path)
    config, facts = msgspec.structs.replace(saved.plain.config, speed=REFERENCE), saved.facts
    model = build_network(config, facts, (device,))
    restore_weights(model, saved, path, ema)
    return Member(model.eval(), MeanSubtraction(facts.mean, model.preset, (device,))), facts
