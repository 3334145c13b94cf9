"""A feed for two processes: tower 0's owns the client of the loader and hands each batch to its twin.

The uint8 pixels go from device to device; where they were cut and the labels go through the host. Whatever ends the feed
in the owner, its end, a stop or a lost node, ends it in the twin too.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from trainer.data.feed import DeviceBatch, Feed
from trainer.data.normalisation import Facts, Windows
from trainer.parallel.world import Pair, World
from trainer.stop import Stopped, StopRequest


class _Message(IntEnum):
    """The first number that the owner sends."""

    BATCH = 0
    END = 1
    BROKEN = 2


def share_facts(facts: Facts | None, world: World) -> Facts:
    """The facts that tower 0's process has of the training split, in both; the twin needs no names."""
    pair = world.pair
    if pair is None:
        assert facts is not None
        return facts
    if facts is not None:
        pair.send(torch.tensor([facts.count, len(facts.class_names), len(facts.mean), facts.crop]))
        pair.send(facts.mean.contiguous())
        return facts
    count, classes, side, crop = pair.receive(torch.empty(4, dtype=torch.int64)).tolist()
    mean = pair.receive(torch.empty(side, side, 3))
    return Facts(count, ("",) * classes, "", mean, crop)


class PairedFeed:
    """The batches of ``feed``, in both processes of a pair, or in the one process there is.

    Args:
        feed: an open feed; None in tower 1's process.
        world: who else is there.
        stop: ends the waiting.
    """

    def __init__(self, feed: Feed | None, world: World, stop: StopRequest) -> None:
        self._feed, self._pair, self._stop = feed, world.pair, stop
        self._device = world.devices[0]

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        if self._feed is None:
            assert self._pair is not None
            return _receive_batch(self._pair, self._device)
        message = _Message.BROKEN
        try:
            with self._stop.interruptible():
                batch = next(self._feed)
            message = _Message.BATCH
        except StopIteration:
            message = _Message.END
            raise
        finally:
            if self._pair is not None and message is not _Message.BATCH:
                _announce(self._pair, message)
        if self._pair is not None:
            _send_batch(self._pair, batch)
        return batch


def _announce(pair: Pair, message: _Message, *numbers: int) -> None:
    pair.send(torch.tensor([message, *numbers, *[0] * (4 - len(numbers))]))


def _send_batch(pair: Pair, batch: DeviceBatch) -> None:
    (images,) = batch.images
    _announce(pair, _Message.BATCH, len(images), images.shape[1], batch.views, batch.epoch)
    if not len(images):
        return
    windows = batch.windows
    pair.send(torch.from_numpy(np.stack([windows.y, windows.x, windows.flip.astype(np.int64)])))
    pair.send(batch.labels.cpu())
    pair.send(images.contiguous())


def _receive_batch(pair: Pair, device: torch.device) -> DeviceBatch:
    message, pictures, side, views, epoch = pair.receive(torch.empty(5, dtype=torch.int64)).tolist()
    if message == _Message.END:
        raise StopIteration
    if message == _Message.BROKEN:
        raise Stopped
    windows, labels = np.zeros((3, 0), np.int64), torch.empty(pictures // views, dtype=torch.int64)
    images: Tensor = torch.empty(pictures, side, side, 3, dtype=torch.uint8, device=device)
    if pictures:
        windows = pair.receive(torch.empty(3, pictures, dtype=torch.int64)).numpy()
        pair.receive(labels)
        pair.receive(images)
    return DeviceBatch(
        images=(images,),
        windows=Windows(windows[0], windows[1], windows[2].astype(np.bool_)),
        labels=labels.to(device),
        ids=np.zeros(0, np.int64),  # nobody asks the twin
        epoch=epoch,
        views=views,
    )
