"""A feed for a pair of processes: tower 0's process owns the loader's client and sends each batch to its peer.

A short announcement goes through the host; then pixels, and labels, crop positions and dropout masks as one packet, go from
device to device, so that neither process waits for its GPU. When the feed ends in the owner, by its last batch, a stop or a
lost node, it ends in the peer too.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

from trainer.data.feed import DeviceBatch, Feed
from trainer.data.normalisation import Facts, Windows
from trainer.model.dropout import MaskPlan
from trainer.parallel.world import Pair, World
from trainer.stop import Stopped, StopRequest


class _Message(IntEnum):
    """Kinds of message, the first number that the owner sends."""

    BATCH = 0
    END = 1
    BROKEN = 2


def share_facts(facts: Facts | None, world: World) -> Facts:
    """Return the facts about the training split in both processes; only tower 0's knows the names of the classes."""
    pair = world.pair
    if pair is None:
        assert facts is not None
        return facts
    if facts is not None:
        pair.send(torch.tensor([facts.count, len(facts.class_names), len(facts.mean), facts.crop]))  # (4,) int64
        pair.send(facts.mean.contiguous())
        return facts
    count, classes, side, crop = pair.receive(torch.empty(4, dtype=torch.int64)).tolist()
    mean = pair.receive(torch.empty(side, side, 3))
    return Facts(count, ("",) * classes, "", mean, crop)


class PairedFeed:
    """An iterator over the batches of a feed, in both processes of a pair, or in a process with all towers.

    Args:
        feed: open feed; None in tower 1's process.
        world: processes of the run.
        stop: stop request, which interrupts the wait for a batch.
        plan: dropout masks to draw for the batches, of both towers; None for none. Both processes name the same.
    """

    def __init__(self, feed: Feed | None, world: World, stop: StopRequest, plan: MaskPlan | None = None) -> None:
        self._feed, self._pair, self._stop, self._plan = feed, world.pair, stop, plan
        self._device = world.devices[0]
        self._received = 0  # batches, in tower 1's process
        if feed and plan:
            feed.draw_masks(plan)

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        if self._feed is None:
            assert self._pair is not None
            number, self._received = self._received, self._received + 1
            return _receive_batch(self._pair, self._device, self._plan, number)
        message = _Message.BROKEN  # unless a batch or the end comes
        try:
            with self._stop.interruptible():
                batch = next(self._feed)
            message = _Message.BATCH
        except StopIteration:
            message = _Message.END
            raise
        finally:  # also after an error: the peer waits for a message
            if self._pair is not None and message is not _Message.BATCH:
                _announce(self._pair, message)
        if self._pair is not None:
            _send_batch(self._pair, batch)
        return batch


def _announce(pair: Pair, message: _Message, *numbers: int) -> None:
    """Send a kind of message and at most four numbers, as (5,) int64: the receiver must know the size."""
    pair.send(torch.tensor([message, *numbers, *[0] * (4 - len(numbers))]))


def _send_batch(pair: Pair, batch: DeviceBatch) -> None:
    """Send a batch in the order that ``_receive_batch`` reads."""
    (images,), (windows,) = batch.images, batch.windows  # (P, S, S, 3) uint8; a process of a pair has one device
    _announce(pair, _Message.BATCH, len(images), images.shape[1], batch.views, batch.epoch)
    if not len(images):
        return
    masks = batch.masks.bits[0].values() if batch.masks else ()
    numbers = torch.cat([batch.labels, windows.y, windows.x])  # (B + 2 P,) int64
    pair.send(torch.cat([numbers.view(torch.uint8), windows.flip.view(torch.uint8), *masks]))
    pair.send(images.contiguous())


def _receive_batch(pair: Pair, device: torch.device, plan: MaskPlan | None, number: int) -> DeviceBatch:
    """Return the peer's next batch, ``number`` of the plan; raise StopIteration after its last one, Stopped if the peer leaves."""
    message, count, side, views, epoch = pair.receive(torch.empty(5, dtype=torch.int64)).tolist()
    if message == _Message.END:
        raise StopIteration
    if message == _Message.BROKEN:
        raise Stopped
    records = count // max(1, views)
    sizes = [8 * records, 8 * count, 8 * count, count, plan.size_bytes(records) if plan else 0]
    images: Tensor = torch.empty(count, side, side, 3, dtype=torch.uint8, device=device)
    packet = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if count:  # an empty batch is its announcement alone
        pair.receive(packet)
        pair.receive(images)
    labels, y, x, flip, masks = torch.split(packet, sizes)
    return DeviceBatch(
        images=(images,),
        windows=(Windows(y.view(torch.int64), x.view(torch.int64), flip.view(torch.bool)),),
        labels=labels.view(torch.int64),
        ids=torch.empty(0, dtype=torch.int64, device=device),  # not needed in tower 1's process
        epoch=epoch,
        views=views,
        masks=plan.drawn(number, records, [masks]) if plan else None,
    )
