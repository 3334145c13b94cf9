"""Export of a trained network to a safetensors file, with the towers merged into one network with grouped convolutions.

The kernels of both towers are concatenated. Layers that read only their own tower (conv2, conv4, conv5) become grouped
convolutions; the others read all maps, and LRN stays within each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import RunFolderError
from trainer.model.alexnet import CONV1_PADDING, KERNELS, AlexNet
from trainer.model.lrn import local_response_norm
from trainer.model.speed import REFERENCE
from trainer.run import checkpoint
from trainer.run.folder import find_checkpoint, write_atomically
from trainer.run.state import build_network, restore_weights


class Grouped(nn.Module):
    """The network of ``model`` without towers, for inference only.

    Maps (B, 3, crop, crop) float32, 0 to 255 minus the mean, to (B, classes) logits.
    """

    def __init__(self, model: AlexNet) -> None:
        super().__init__()
        self._towers, self._preset, self._ablation = model.sizes.towers, model.preset, model.ablation
        self._activate = torch.tanh if model.ablation.activation == "tanh" else functional.relu
        self._first_after_exchange = next(name for name in ("conv3", "conv4", "conv5") if name in model.sizes.counts())
        for name, tensor in merge(model).items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch; shapes as in the class."""
        maps = self._convolve("conv1", functional.pad(images, CONV1_PADDING))
        if self._preset.relu_before_lrn1:
            maps = self._pool(self._normalise(self._activate(maps)))
        else:
            maps = self._activate(self._pool(self._normalise(maps)))
        if self._has("conv2"):
            maps = self._normalise(self._activate(self._convolve("conv2", maps)))
        maps = self._pool(maps)
        for name in ("conv3", "conv4", "conv5"):
            if self._has(name):
                maps = self._activate(self._convolve(name, maps))
        units = self._pool(maps).flatten(1)
        for name in ("fc6", "fc7"):
            if self._has(name):
                units = self._activate(functional.linear(units, *self._of(name)))
                units = units * 0.5 if self._ablation.dropout else units  # paper section 4.2
        return functional.linear(units, *self._of("fc8"))

    def _has(self, name: str) -> bool:
        return f"{name}_weight" in self._buffers

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")

    def _convolve(self, name: str, maps: Tensor) -> Tensor:
        _, stride, padding = KERNELS[name]
        # conv1 reads the image and the first layer after the exchange reads both towers, so neither has groups.
        groups = 1 if name in ("conv1", self._first_after_exchange) else self._towers
        return functional.conv2d(maps, *self._of(name), stride=stride, padding=padding, groups=groups)

    def _normalise(self, maps: Tensor) -> Tensor:
        if not self._ablation.lrn:
            return maps
        # The window of LRN ends at the edge of its tower.
        parts = [local_response_norm(part, self._preset.lrn_alpha) for part in maps.chunk(self._towers, 1)]
        return torch.cat(parts, 1)

    def _pool(self, maps: Tensor) -> Tensor:
        return functional.max_pool2d(maps, 3 if self._ablation.pooling == "overlapping" else 2, 2)


def merge(model: AlexNet) -> dict[str, Tensor]:
    """Return the parameters of the grouped network, ``conv1.weight`` to ``fc8.bias``, contiguous, on the CPU."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    first = [name.removeprefix("towers.0.") for name in state if name.startswith("towers.0.")]
    merged = {
        name: torch.cat([state[f"towers.{tower}.{name}"] for tower in range(model.sizes.towers)]) for name in first
    }
    merged |= {name: tensor for name, tensor in state.items() if name.startswith("fc8.")}
    return {name: tensor.contiguous() for name, tensor in merged.items()}


def split(merged: Mapping[str, Tensor], towers: int) -> dict[str, Tensor]:
    """Invert ``merge``: return the state of an ``AlexNet`` with ``towers`` towers."""
    state: dict[str, Tensor] = {}
    for name, tensor in merged.items():
        parts: Sequence[Tensor] = [tensor] if name.startswith("fc8.") else tensor.chunk(towers)
        prefix = ["" if name.startswith("fc8.") else f"towers.{tower}." for tower in range(towers)]
        state |= {f"{where}{name}": part.clone() for where, part in zip(prefix, parts, strict=False)}
    return state


def export_run(run: Path, target: Path) -> None:
    """Export the network of a run's newest checkpoint, its mean image and class names to a safetensors file.

    Raises:
        RunFolderError: there is no run, or the file exists or cannot be written.
        CheckpointError: the checkpoint cannot be used.
    """
    path = find_checkpoint(run)
    saved = checkpoint.load(path)
    if target.exists():  # before the work; an export never overwrites
        raise RunFolderError(target, "the file exists already; choose another name")
    config, facts = msgspec.structs.replace(saved.plain.config, speed=REFERENCE), saved.facts
    model = build_network(config, facts, (torch.device("cpu"),))
    restore_weights(model, saved, path)
    about = {
        "architecture": "AlexNet; see trainer.evaluation.export.Grouped",
        "config": msgspec.json.encode(config).decode(),
        "class_names": msgspec.json.encode(facts.class_names).decode(),
        "fingerprint": facts.fingerprint,
        "crop": str(facts.crop),
    }
    content = save(merge(model) | {"mean": facts.mean.contiguous()}, metadata=about)
    try:
        write_atomically(target, content)
    except OSError as error:
        raise RunFolderError(target, f"it cannot be written ({error.strerror})") from error
