"""Single samples for pictures: a record as it is, and as a training gets it in each epoch.

Like ``trainer.data.feed`` this talks to the loader service; the bytes are those that every client gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loader_service import Loader, View
from loader_service.data.fill import slice_numbers
from loader_service.types import SliceId, Split
from trainer.data.feed import Endpoint

CENTRE_SHUFFLED: Final = View(kind="center", crop=0, flip=False, jitter=0.0)
"""Centre crops in a random order, so that the first of them are a fair sample of a split that is sorted by class."""

_CENTRE: Final = View(kind="center", crop=0, flip=False, jitter=0.0, order="sequential")

_SEARCHED: Final = 1 << 20
"""Positions of an epoch's order that are searched at once: 8 MiB."""

_ANSWER_S: Final = 10.0
"""Time for a node to answer, if its user gave none."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FedSample:
    """A record as one epoch feeds it.

    Fields:
        epoch: number of the epoch, from 0.
        pixels: (crop, crop, 3) uint8, R, G, B.
        y, x: first row and column of the crop in its record, before the flip.
        flip: True if it is mirrored.
        shift: grey levels that the colour jitter adds to R, G and B.
    """

    epoch: int
    pixels: Pixels
    y: int
    x: int
    flip: bool
    shift: tuple[int, int, int]


def training_fingerprint(node: Endpoint) -> str:
    """Return the fingerprint of the training split that a node serves.

    Raises:
        LoaderServiceError: the node cannot serve it.
    """
    return node.describe(node.timeout_s or _ANSWER_S).fingerprint


def whole_record(node: Endpoint, split: Split, record: int) -> Pixels:
    """Return a record as it is stored, (side, side, 3) uint8, R, G, B.

    Raises:
        LoaderServiceError: the node cannot serve it.
    """
    with _open(node, split, "whole", None, 0, 1) as loader:
        return np.array(_at(loader, 0, record).images[0])


def centre_crops(node: Endpoint, split: Split, records: Sequence[int], crop: int) -> list[Pixels]:
    """Return the centre crops of records, each (crop, crop, 3) uint8, R, G, B.

    Raises:
        LoaderServiceError: the node cannot serve them.
    """
    with _open(node, split, _CENTRE, crop, 0, 1) as loader:
        return [np.array(_at(loader, 0, record).images[0]) for record in records]


def fed_samples(node: Endpoint, view: View, crop: int, seed: int, record: int, epochs: int) -> list[FedSample]:
    """Return a training record as a run with that view and seed gets it in each of its first ``epochs`` epochs.

    Raises:
        LoaderServiceError: the node cannot serve it.
    """
    found = []
    with _open(node, "train", view, crop, seed, epochs) as loader:
        for epoch in range(epochs):
            batch = _at(loader, epoch, _position(loader, seed, epoch, record))
            draw = batch.draws[0]
            red, green, blue = (int(level) for level in draw["shift"])
            found.append(
                FedSample(
                    epoch=epoch,
                    pixels=np.array(batch.images[0]),
                    y=int(draw["y"]),
                    x=int(draw["x"]),
                    flip=bool(draw["flip"]),
                    shift=(red, green, blue),
                )
            )
    return found


def _position(loader: Loader, seed: int, epoch: int, record: int) -> int:
    """Return the position of a record in an epoch's order; the memory that it takes does not grow with the dataset."""
    count = loader.dataset.count
    for start in range(0, count, _SEARCHED):
        order = slice_numbers(
            count, SliceId(loader.view, seed, epoch, start, min(_SEARCHED, count - start))
        )  # (n,) int64
        found = np.flatnonzero(order == record)
        if len(found):
            return start + int(found[0])
    raise ValueError(f"there is no record {record} among {count}")


def _open(node: Endpoint, split: Split, view: str | View, crop: int | None, seed: int, epochs: int) -> Loader:
    return Loader(
        node.address,
        split=split,
        view=view,
        crop=crop,
        batch_size=1,
        seed=seed,
        epochs=epochs,
        timeout_s=node.timeout_s,
        server_key=node.server_key,
        client_key=node.client_key,
        insecure=node.insecure,
    )


def _at(loader: Loader, epoch: int, position: int) -> Any:
    """Return the batch of one sample at a position of an epoch."""
    loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "position": position})
    return next(loader.all_epochs())
