"""Passes of the network over a part of the data: guesses, confusion matrix, and the units of the last hidden layer.

The number of images of each split has a limit, because a CPU computes some dozen of the full network's images per second.
The images are the first ones of a random order, so a split that is sorted by class is sampled fairly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

from loader_service.types import Split
from trainer.data.feed import Endpoint, Feed
from trainer.data.normalisation import Facts, MeanSubtraction
from trainer.data.samples import CENTRE_SHUFFLED
from trainer.evaluation.evaluate import Member
from trainer.evaluation.scores import TOP, Evaluation, ScoreCounter
from trainer.model.speed import REFERENCE
from trainer.report.records import RunRecord
from trainer.run.state import build_network, restore_weights

Advance = Callable[[int, int], None]
"""A function that is told of progress: images done, and images in all."""


@dataclass(frozen=True)
class Network:
    """A run's network in evaluation mode, on one device, in float32.

    Fields:
        member: the network and the normalisation of its input.
        facts: facts about its training split.
        device: its device.
        hidden: name of the last hidden layer: ``fc7``, unless the run left it out.
    """

    member: Member
    facts: Facts
    device: torch.device
    hidden: str


@dataclass(frozen=True)
class Look:
    """The results of a pass over P images of a split.

    Fields:
        split_images: images in the whole split.
        records: (P,) int64, their record numbers, in a random order.
        labels: (P,) int64, their classes.
        best: (P, TOP) int64, classes of the best guesses, the best first; fewer than TOP if there are fewer classes.
        probabilities: (P, TOP) float32, of these guesses.
        units: (P, U) float32, outputs of the last hidden layer of both towers.
        evaluation: errors and confusion matrix over these images.
    """

    split_images: int
    records: Tensor
    labels: Tensor
    best: Tensor
    probabilities: Tensor
    units: Tensor
    evaluation: Evaluation


def load_network(run: RunRecord, device: torch.device) -> Network:
    """Return the network of a run's newest readable checkpoint.

    Raises:
        CheckpointError: its weights do not fit.
        TrainerError: its configuration cannot work here.
    """
    saved, path = run.checkpoint, run.checkpoint_path
    assert saved is not None, "the caller looks for a checkpoint first"
    assert path is not None
    config = msgspec.structs.replace(saved.plain.config, speed=REFERENCE)
    model = build_network(config, saved.facts, (device,))
    restore_weights(model, saved, path)
    subtract = MeanSubtraction(saved.facts.mean, model.preset, (device,))
    present = [name for name in ("fc7", "fc6") if name not in config.ablation.without]
    return Network(Member(model.eval(), subtract), saved.facts, device, present[0] if present else "the last pooling")


def look(network: Network, node: Endpoint, split: Split, limit: int, batch_size: int, advance: Advance) -> Look:
    """Compute the network's outputs for the first images of a split in a random order.

    Args:
        network: network of a run.
        node: node that serves the split.
        split: ``train`` or ``val``; centre crops of either.
        limit: most images.
        batch_size: images per batch.
        advance: called after each batch.

    Raises:
        LoaderServiceError: the node cannot serve.
    """
    records, labels, best, probabilities, units = (
        list[Tensor](),
        list[Tensor](),
        list[Tensor](),
        list[Tensor](),
        list[Tensor](),
    )
    counter, done = ScoreCounter(), 0
    crop = network.facts.crop
    with (
        Feed(node, split, CENTRE_SHUFFLED, min(batch_size, limit), (network.device,), crop=crop) as feed,
        _units_of(network.member.model.fc8) as noted,
        torch.inference_mode(),
    ):
        images = min(limit, feed.facts.count)
        for batch in feed:
            count = min(len(batch.labels), images - done)  # the last batch may go beyond the limit
            shares = network.member.probabilities(batch.images, batch.windows, 1)[:count]  # (count, classes)
            top = shares.topk(min(TOP, shares.shape[1]))
            counter.add(shares, batch.labels[:count])
            # Copies: on a CPU labels and record numbers are views of the loader's memory.
            for into, tensor in (
                (records, batch.ids[:count]),
                (labels, batch.labels[:count]),
                (best, top.indices),
                (probabilities, top.values),
                (units, noted[-1][:count]),
            ):
                into.append(tensor.clone().cpu())
            noted.clear()
            done += count
            del batch
            advance(done, images)
            if done == images:
                break
        return Look(
            feed.facts.count,
            torch.cat(records),
            torch.cat(labels),
            torch.cat(best),
            torch.cat(probabilities),
            torch.cat(units),
            counter.evaluation(None),
        )


def nearest(units: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the nearest rows by Euclidean distance.

    Args:
        units: (P, U) float32.
        among: (Q, U) float32.
        count: rows to return, at most Q.

    Returns:
        Distances (P, count), rising, and indices into ``among`` (P, count).
    """
    found = torch.cdist(units, among).topk(min(count, len(among)), largest=False)
    return found.values, found.indices


@contextmanager
def _units_of(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """Note the inputs of the last layer, which are the outputs of the last hidden one."""
    assert head is not None, "a process with all towers has fc8"
    noted: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _layer, given: noted.append(given[0]))
    try:
        yield noted
    finally:
        handle.remove()
