"""The trainer's interface to the loader service; no other module of the trainer talks to it.

It finds a node or starts a private one, turns the batches of a ``Loader`` into tensors on the devices, and measures how
long the trainer waits for them. Pixels stay uint8 until they are on the device, where ``trainer.data.normalisation``
converts them to floats.
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
from loader_service.data.image_file import load_picture
from loader_service.errors import LoaderServiceError, NoNodeError
from loader_service.types import Split
from trainer.config import Source
from trainer.data.normalisation import Facts, Windows
from trainer.model.ablation import Ablation
from trainer.model.presets import Preset
from trainer.parallel.devices import Stager

__all__ = ["DeviceBatch", "Endpoint", "Feed", "LoaderServiceError", "load_image", "open_source", "training_view"]

_PROBE_S: Final = 1.0
"""Time for a node at the default address to answer before the trainer starts a private one."""

_GREY_LEVELS: Final = 255
"""The manifest's eigenvalues are for pixels in 0 to 1; jitter is added to pixels in 0 to 255."""

_PRIVATE_TIMEOUT_S: Final = 60.0
"""Time for a batch of a private node to arrive. Only this process would restart that node, so a longer wait is useless."""


@dataclass(frozen=True)
class Endpoint:
    """A node that serves the trainer, and how to reach it.

    Fields:
        address: ZeroMQ address of the node.
        about: sentence for the user that names the node.
        timeout_s: seconds to wait for the node; None waits without limit, for a node that someone else may restart.
        server_key, client_key: key files, as in ``trainer.config.Source``.
    """

    address: str
    about: str
    timeout_s: float | None = None
    server_key: str | None = None
    client_key: str | None = None


@dataclass(frozen=True)
class DeviceBatch:
    """A batch of B records as tensors on the devices.

    Fields:
        images: for each device (B V, S, S, 3) uint8, R, G, B; the V crops of a record are adjacent.
        windows: position of each crop in its record.
        labels: (B,) int64 on the first device.
        ids: (B,) int64 on the host, the record number of each position.
        epoch: number of the epoch, from 0.
        views: V, crops of each record: 10 for ten-crop, else 1.
    """

    images: tuple[Tensor, ...]
    windows: Windows
    labels: Tensor
    ids: npt.NDArray[np.int64]
    epoch: int
    views: int


class Feed:
    """An iterator over the batches of a split, for the remaining epochs; use it as a context manager.

    Args:
        node: source of the batches.
        split: ``train`` or ``val``.
        view: augmentation policy, a name or a value.
        batch_size: records per batch and rank; an epoch's last batch may be smaller, or empty if there are several ranks.
        devices: targets of the images, one copy for each entry.
        seed: seed of the order and the augmentation.
        epochs: total number of epochs, including those before ``state``.
        state: result of ``state`` of an earlier feed, to continue there; None starts at the first sample.
        rank, world_size: part of each batch that this process takes, and number of parts.
        crop: side of the crops, in pixels; None takes the view's, and for a view's name 7/8 of the records' side.

    On a CPU the images are views of the loader's memory: release a batch before fetching many more.
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
            self._loader.load_state_dict(state)  # refuses another dataset, view or seed
        self._stager = Stager(devices)
        self._first = devices[0]
        self.waited_s = 0.0
        """Seconds spent waiting for the loader."""

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
        finally:  # also if a stop interrupts the wait
            self.waited_s += time.perf_counter() - began_s
        draws = batch.draws.reshape(-1)  # (B V,) struct: y, x, flip, shift
        return DeviceBatch(
            images=self._stager.put(batch.images.reshape(-1, *batch.images.shape[-3:])),  # (B V, S, S, 3)
            windows=Windows(draws["y"].astype(np.int64), draws["x"].astype(np.int64), draws["flip"].copy()),
            labels=torch.from_numpy(batch.labels.copy()).to(self._first, non_blocking=True),
            ids=batch.ids.copy(),
            epoch=batch.epoch,
            views=draws.size // max(1, len(batch.labels)),  # a rank's part of a short last batch may be empty
        )

    @property
    def facts(self) -> Facts:
        """Facts about the split, as the node reports them."""
        dataset = self._loader.dataset
        return Facts(
            count=dataset.count,
            class_names=tuple(dataset.class_names),
            fingerprint=dataset.fingerprint,
            mean=torch.from_numpy(np.array(dataset.mean, np.float32)),
            crop=self._loader.view.crop,
        )

    def state(self) -> dict[str, Any]:
        """Return the position of the first sample that has not been delivered, as plain values."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def accounts(self) -> list[EpochAccount]:
        """Return the account of each epoch that this feed has begun."""
        return self._loader.ledger


@contextmanager
def open_source(source: Source) -> Iterator[Endpoint]:
    """Find a running node, or start a private one that stops with the context."""
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
    """Return the augmentation policy of training (paper section 4.1): random crops, flips and PCA colour jitter.

    The preset decides the scale of the jitter, the ablation may switch parts off. The crop is 0: the records' side decides.
    """
    if not ablation.crops:
        return View(kind="center", crop=0, flip=False, jitter=0.0)  # the order stays shuffled
    if not ablation.jitter:
        return View(crop=0, flip=ablation.flips, jitter=0.0)
    if not preset.jitter_by_deviation:
        return View(crop=0, flip=ablation.flips)
    facts = describe(node.address, split="train", server_key=node.server_key, client_key=node.client_key)
    # The authors' code scales each axis by its standard deviation, not by its eigenvalue.
    deviations = np.sqrt(np.asarray(facts.eigenvalues, np.float64))
    basis = _GREY_LEVELS * np.asarray(facts.eigenvectors, np.float64) * deviations  # (3, 3), column k is axis k
    return View(crop=0, flip=ablation.flips, basis=tuple(basis.flatten().tolist()))


def load_image(path: Path, facts: Facts) -> tuple[Tensor, Windows]:
    """Return the centre crop of an image file, preprocessed like the dataset: (1, crop, crop, 3) uint8, and its window."""
    side, crop = len(facts.mean), facts.crop
    windows = Windows.centre(1, side, crop)
    top, left = int(windows.y[0]), int(windows.x[0])
    image = load_picture(path, side=side)[top : top + crop, left : left + crop]
    return torch.from_numpy(np.ascontiguousarray(image))[None], windows


def _answers(address: str, source: Source) -> bool:
    """Return True if a node answers at ``address`` within _PROBE_S."""
    keys = {"server_key": source.server_key, "client_key": source.client_key}
    try:
        describe(address, split="train", timeout_s=_PROBE_S, **keys)
    except NoNodeError:
        return False
    return True
