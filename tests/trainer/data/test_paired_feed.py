"""The feed of a pair of processes, here two threads' worth of it in one: what is sent, in what order, and its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from trainer.data.feed import DeviceBatch, Feed
from trainer.data.normalisation import Windows
from trainer.data.paired_feed import PairedFeed
from trainer.model.dropout import MaskPlan, dropout_mask
from trainer.model.rng import DropoutKey
from trainer.parallel.world import Pair, World
from trainer.stop import Stopped, StopRequest

CPU = torch.device("cpu")
PLAN = MaskPlan(DropoutKey(1, 4), {(0, 6): 5, (1, 6): 5, (1, 7): 9})
SIDE = 4


class Wire:
    """A pair's connection in one direction: what tower 0 sends waits until tower 1 receives it."""

    def __init__(self) -> None:
        self.sent: deque[Tensor] = deque()

    def send(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.sent.append(tensor)

    def receive(self, buffer: Tensor) -> Tensor:
        tensor = self.sent.popleft()
        assert (tensor.shape, tensor.dtype) == (buffer.shape, buffer.dtype)
        return buffer.copy_(tensor)


class GivenFeed:
    """A feed of given batches."""

    def __init__(self, *sizes: int, views: int = 1, failure: Exception | None = None) -> None:
        self._sizes, self._views, self._failure = sizes, views, failure

    def draw_masks(self, plan: MaskPlan) -> None:
        assert plan is PLAN

    def __iter__(self) -> Iterator[DeviceBatch]:
        for number, size in enumerate(self._sizes):
            crops = size * self._views
            bits = torch.from_numpy(PLAN.draw(number, size))
            yield DeviceBatch(
                images=(torch.arange(crops * SIDE * SIDE * 3).view(crops, SIDE, SIDE, 3).byte(),),
                windows=(Windows(torch.arange(crops), torch.arange(crops) + 7, torch.arange(crops) % 3 == 0),),
                labels=torch.arange(size) * 2,
                ids=torch.arange(size),
                epoch=number,
                views=self._views,
                masks=PLAN.drawn(number, size, [bits]),
            )
        if self._failure:
            raise self._failure


def paired(feed: GivenFeed) -> tuple[PairedFeed, PairedFeed, Wire]:
    """Return both ends of a paired feed, tower 0's first, and the wire between them."""
    wire = Wire()
    world = World((CPU,), pair=cast("Pair", wire))
    with StopRequest() as stop:
        owner = PairedFeed(cast("Feed", _Iterated(feed)), world, stop, PLAN)
        return owner, PairedFeed(None, world, stop, PLAN), wire


class _Iterated:
    def __init__(self, feed: GivenFeed) -> None:
        self._batches, self.draw_masks = iter(feed), feed.draw_masks

    def __next__(self) -> DeviceBatch:
        return next(self._batches)


@pytest.mark.parametrize("views", [1, 10])
def test_the_peer_gets_the_batch_without_a_copy_to_the_host(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An announcement, one packet and the pixels are sent, none of them by way of ``cpu()``, which waits for the GPU."""
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: pytest.fail("a copy to the host"))
    owner, peer, wire = paired(GivenFeed(3, 2, views=views))
    for number in range(2):
        batch = next(owner)
        assert len(wire.sent) == 3
        received = next(peer)
        assert torch.equal(received.images[0], batch.images[0])
        for name in ("y", "x", "flip"):
            assert torch.equal(getattr(received.windows[0], name), getattr(batch.windows[0], name))
        assert torch.equal(received.labels, batch.labels)
        assert (received.epoch, received.views) == (number, views)
        key = DropoutKey(1, 4 + number)
        masks, shape = received.dropout(key), (len(batch.labels), 9)
        assert masks is not key
        assert torch.equal(dropout_mask(shape, masks, 1, 7, CPU), dropout_mask(shape, key, 1, 7, CPU))


def test_an_empty_batch_is_its_announcement_alone() -> None:
    """A replica's part of a short last batch may be empty; the peer's is, too."""
    owner, peer, wire = paired(GivenFeed(0))
    next(owner)
    assert len(wire.sent) == 1
    received = next(peer)
    assert len(received.labels) == len(received.images[0]) == 0


def test_the_end_and_a_failure_reach_the_peer() -> None:
    """After the owner's last batch the peer's feed ends; after an error in the owner the peer stops."""
    owner, peer, _ = paired(GivenFeed())
    with pytest.raises(StopIteration):
        next(owner)
    with pytest.raises(StopIteration):
        next(peer)
    owner, peer, _ = paired(GivenFeed(failure=ConnectionResetError()))
    with pytest.raises(ConnectionResetError):
        next(owner)
    with pytest.raises(Stopped):
        next(peer)
