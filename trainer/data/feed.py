"""Where the trainer meets the loader service, and the only place where it does.

Opens a node or starts a private one, turns a Loader's batches into tensors on the devices, and measures how long the
trainer waited for them. Pixels stay uint8 until they are on the device; ``trainer.data.normalisation`` makes floats of them there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loader_service import EpochAccount, Loader, LocalNode, View, defaults, describe
from loader_service.data.picture import load_picture
from loader_service.errors import LoaderServiceError, NoNodeError
from loader_service.types import Split
from trainer.config import Source
from trainer.data.normalisation import Facts, Windows
from trainer.model.ablation import Ablation
from trainer.model.presets import Preset
from trainer.parallel.devices import Stager

__all__ = ["DeviceBatch", "Endpoint", "Feed", "LoaderServiceError", "load_image", "open_source", "training_view"]

_PROBE_S: Final = 1.0
"""How long a node at the usual address may take to answer before a private one is started."""

_GREY_LEVELS: Final = 255

_PRIVATE_TIMEOUT_S: Final = 60.0
"""How long a batch of a private node may take. Nobody but its trainer would start it again, so waiting on is no use."""


@dataclass(frozen=True)
class Endpoint:
    """A node that serves the trainer.

    Fields:
        address: where it answers.
        about: a sentence that says which node it is.
        timeout_s: how long to wait for it; None for a node that others may start, now or again.
        server_key, client_key: as in ``trainer.config.Source``.
    """

    address: str
    about: str
    timeout_s: float | None = None
    server_key: str | None = None
    client_key: str | None = None


@dataclass(frozen=True)
class DeviceBatch:
    """What one step works on.

    Fields:
        images: for each device (B V, S, S, 3) uint8, R, G, B; V pictures of a record follow each other (ten crops, or 1).
        windows: where each picture was cut.
        labels: (B,) int64 on the first device.
        ids: (B,) int64, the record number of each position, on the host.
        epoch: which pass over the data.
        views: V.
    """

    images: tuple[Tensor, ...]
    windows: Windows
    labels: Tensor
    ids: npt.NDArray[np.int64]
    epoch: int
    views: int


class Feed:
    """The batches of a split, on the devices; a context manager and an iterator over all epochs that remain.

    Args:
        node: where batches come from.
        split: ``train`` or ``val``.
        view: which augmentation; a name or a value.
        batch_size: records per batch and rank; an epoch's last batch may be smaller, or empty if there are several ranks.
        devices: where the images go, one copy for each entry.
        seed: of the order and the augmentation.
        epochs: how many passes, counted from the first.
        state: what ``state`` gave of an earlier feed, to go on from there.
        rank, world_size: which part of each batch, of how many.
        crop: side of the pictures, in pixels; None takes what the view says, and with a name 7/8 of the records' side.

    A CPU batch's images are views of the loader's memory: use them before asking for many more.
    """

    def __init__(
        self,
        node: Endpoint,
        split: Split,
        view: str | View,
        batch_size: int,
        devices: Sequence[torch.device],
        seed: int = 0,
        epochs: int = 1,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        crop: int | None = None,
    ) -> None:
        self._loader = Loader(
            node.address,
            split=split,
            view=view,
            crop=crop,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            timeout_s=node.timeout_s,
            rank=rank,
            world_size=world_size,
            server_key=node.server_key,
            client_key=node.client_key,
        )
        if state is not None:
            self._loader.load_state_dict(state)
        self._stager = Stager(devices)
        self._first = devices[0]
        self.waited_s = 0.0
        """Seconds that the trainer has spent waiting for the loader."""

    def __enter__(self) -> Feed:
        self._loader.__enter__()
        self._batches = iter(self._loader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loader.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        began_s = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - began_s
        draws = batch.draws.reshape(-1)
        return DeviceBatch(
            images=self._stager.put(batch.images.reshape(-1, *batch.images.shape[-3:])),
            windows=Windows(draws["y"].astype(np.int64), draws["x"].astype(np.int64), draws["flip"].copy()),
            labels=torch.from_numpy(batch.labels.copy()).to(self._first, non_blocking=True),
            ids=batch.ids.copy(),
            epoch=batch.epoch,
            views=draws.size // max(1, len(batch.labels)),
        )

    @property
    def facts(self) -> Facts:
        """What the node said of the dataset."""
        dataset = self._loader.dataset
        return Facts(
            count=dataset.count,
            class_names=tuple(dataset.class_names),
            fingerprint=dataset.fingerprint,
            mean=torch.from_numpy(np.array(dataset.mean, np.float32)),
            crop=self._loader.view.crop,
        )

    def state(self) -> dict[str, Any]:
        """The position of the first sample that has not been handed out, as plain values."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def accounts(self) -> list[EpochAccount]:
        """The ledger of each epoch that this feed has begun."""
        return self._loader.ledger


@contextmanager
def open_source(source: Source) -> Iterator[Endpoint]:
    """Find a running node or start a private one, for as long as the context lasts."""
    if source.loader is not None:
        about = f"Batches come from the node at {source.loader}."
        yield Endpoint(source.loader, about, source.timeout_s, source.server_key, source.client_key)
    elif source.data is None and _answers(defaults.ADDRESS, source):
        about = f"Batches come from the node that answers at {defaults.ADDRESS}."
        yield Endpoint(defaults.ADDRESS, about, source.timeout_s, source.server_key, source.client_key)
    else:
        data = source.data or defaults.DATA
        workers = f"{source.workers} worker{'s' if source.workers > 1 else ''}"
        with LocalNode(data=data, workers=source.workers) as local:
            yield Endpoint(
                local.address, f"Batches come from a private node on {data} with {workers}.", _PRIVATE_TIMEOUT_S
            )


def training_view(preset: Preset, ablation: Ablation, node: Endpoint) -> View:
    """The random crops, mirror images and colour jitter of the paper's section 4.1, as preset and variation have it.

    Its crop is left to the dataset.
    """
    if not ablation.crops:
        return View(kind="center", crop=0, flip=False, jitter=0.0)  # in shuffled order all the same
    if not ablation.jitter:
        return View(crop=0, flip=ablation.flips, jitter=0.0)
    if not preset.jitter_by_deviation:
        return View(crop=0, flip=ablation.flips)
    facts = describe(node.address, split="train", server_key=node.server_key, client_key=node.client_key)
    deviations = np.sqrt(np.asarray(facts.eigenvalues, np.float64))
    basis = _GREY_LEVELS * np.asarray(facts.eigenvectors, np.float64) * deviations  # column k is axis k
    return View(crop=0, flip=ablation.flips, basis=tuple(basis.flatten().tolist()))


def load_image(path: Path, facts: Facts) -> tuple[Tensor, Windows]:
    """The centre crop of any picture file, prepared as the dataset was: (1, crop, crop, 3) uint8, and its window."""
    side, crop = len(facts.mean), facts.crop
    windows = Windows.centre(1, side, crop)
    top, left = int(windows.y[0]), int(windows.x[0])
    picture = load_picture(path, side=side)[top : top + crop, left : left + crop]
    return torch.from_numpy(np.ascontiguousarray(picture))[None], windows


def _answers(address: str, source: Source) -> bool:
    keys = {"server_key": source.server_key, "client_key": source.client_key}
    try:
        describe(address, split="train", timeout_s=_PROBE_S, **keys)
    except NoNodeError:
        return False
    return True
