"""The trainer's interface to the loader service; no other module of the trainer talks to it.

It finds a node or starts a private one, takes tensors on the devices from a ``TensorLoader``, and measures how long the
trainer waits for them. Dropout masks travel in the same packet as labels and crop positions. Pixels stay uint8
until they are on the device, where ``trainer.data.normalisation`` converts them to floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loader_service import Batch, Dataset, EpochAccount, Loader, LocalNode, View, defaults, describe
from loader_service.data.image_file import load_picture
from loader_service.errors import KeyFileError, KeyRefused, LoaderServiceError, NoNodeError
from loader_service.torch import TensorLoader
from loader_service.types import Split
from trainer.config import Source
from trainer.data.normalisation import Facts, Windows
from trainer.model.ablation import Ablation
from trainer.model.dropout import DrawnMasks, MaskPlan
from trainer.model.presets import Preset
from trainer.model.rng import DropoutKey

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
        server_key, client_key, insecure: as in ``trainer.config.Source``.
    """

    address: str
    about: str
    timeout_s: float | None = None
    server_key: str | None = None
    client_key: str | None = None
    insecure: bool = False

    def describe(self, timeout_s: float = 5.0) -> Dataset:
        """Return the facts of the training split that the node serves."""
        return describe(
            self.address,
            "train",
            timeout_s,
            server_key=self.server_key,
            client_key=self.client_key,
            insecure=self.insecure,
        )


@dataclass(frozen=True)
class DeviceBatch:
    """A batch of B records as tensors on the devices.

    Fields:
        images: for each device (B V, S, S, 3) uint8, R, G, B; the V crops of a record are adjacent.
        windows: for each device the position of each crop in its record.
        labels: (B,) int64 on the first device.
        ids: (B,) int64 on the first device, the record number of each position; empty in a process of tower 1.
        epoch: number of the epoch, from 0.
        views: V, crops of each record: 10 for ten-crop, else 1.
        masks: dropout masks that came with the batch; None if none were drawn.
    """

    images: tuple[Tensor, ...]
    windows: tuple[Windows, ...]
    labels: Tensor
    ids: Tensor
    epoch: int
    views: int
    masks: DrawnMasks | None = None

    def dropout(self, key: DropoutKey) -> DropoutKey:
        """Return the masks of ``key`` if they came with the batch, else the key, whose masks are then drawn on use."""
        return self.masks if self.masks is not None and self.masks.key == key else key


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

    On a CPU images and labels are views of the loader's memory: release a batch before fetching many more.
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
            insecure=node.insecure,
        )
        if state is not None:
            self._loader.load_state_dict(state)  # refuses another dataset, view or seed
        self._plan: MaskPlan | None = None
        self._sent = self._returned = 0  # batches
        try:
            self._tensors = TensorLoader(self._loader, devices, extra=self._masks)
            self._stream = self._tensors.all_epochs()  # the trainer counts the epochs itself
        except BaseException:
            self._loader.close()
            raise

    def draw_masks(self, plan: MaskPlan) -> None:
        """Draw dropout masks for all batches; call this before the first one."""
        self._plan = plan

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.close()
        self._loader.close()

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        batch = next(self._stream)
        each = (batch, *batch.copies)
        number, self._returned = self._returned, self._returned + 1
        masks = None
        if self._plan:
            masks = self._plan.drawn(number, len(batch.labels), [one.extra["masks"] for one in each])
        return DeviceBatch(
            images=tuple(one.images.view(-1, *one.images.shape[-3:]) for one in each),  # (B V, S, S, 3)
            windows=tuple(Windows(one.y.flatten(), one.x.flatten(), one.flip.flatten()) for one in each),
            labels=batch.labels,
            ids=batch.ids,
            epoch=batch.epoch,
            views=batch.y.numel() // max(1, len(batch.labels)),  # a rank's part of a short last batch may be empty
            masks=masks,
        )

    def _masks(self, batch: Batch) -> Mapping[str, npt.NDArray[np.uint8]]:
        """Draw the masks of the next batch; the TensorLoader may be one batch ahead of this iterator."""
        number, self._sent = self._sent, self._sent + 1
        return {"masks": self._plan.draw(number, len(batch.labels))} if self._plan else {}

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for the loader."""
        return self._loader.waited_s

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
        """Return the position of the first sample that this feed has not returned, as plain values."""
        return self._tensors.state_dict()

    def accounts(self) -> list[EpochAccount]:
        """Return the account of each epoch that this feed has begun."""
        return self._tensors.ledger


@contextmanager
def open_source(source: Source) -> Iterator[Endpoint]:
    """Find a running node, or start a private one that stops with the context."""
    address = source.loader or defaults.ADDRESS
    about = f"Batches come from the node {'at' if source.loader else 'that answers at'} {address}."
    running = Endpoint(address, about, source.timeout_s, source.server_key, source.client_key, insecure=source.insecure)
    usable, why_not = source.loader is not None, ""
    if source.loader is None and source.data is None:
        try:
            usable = _answers(running)
        except (KeyRefused, KeyFileError) as error:
            if source.server_key or source.client_key:  # the user means this node and no other
                raise
            why_not = f" The default address is not used: {error}"
    if usable:
        yield running
        return
    data = source.data or defaults.DATA
    workers = f"{source.workers} worker{'s' if source.workers > 1 else ''}"
    with LocalNode(data=data, workers=source.workers) as local:
        about = f"Batches come from a private node on {data} with {workers}.{why_not}"
        yield Endpoint(local.address, about, _PRIVATE_TIMEOUT_S)


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
    facts = node.describe()
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


def _answers(node: Endpoint) -> bool:
    """Return True if a node answers within _PROBE_S.

    Raises:
        KeyRefused: the node there is another user's.
        KeyFileError: this user's keys cannot be read or made.
    """
    try:
        node.describe(_PROBE_S)
    except NoNodeError:
        return False
    return True
