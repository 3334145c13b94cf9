"""Tests of the tensor wrapper: values, devices and states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loader_service import Loader, errors
from loader_service.torch import TensorLoader

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", ["train", "ten-crop"])
def test_tensors_have_the_arrays_values(node_address: str, device: str, view: str) -> None:
    """Every tensor equals its array and is on the requested device."""
    with Loader(node_address, split="val", view=view, batch_size=16, timeout_s=20) as loader:
        arrays = [(b.images.copy(), b.labels.copy(), b.ids.copy(), b.draws.copy(), b.epoch, b.start) for b in loader]
    with Loader(node_address, split="val", view=view, batch_size=16, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
        assert len(batches) == len(arrays)
        for batch, (images, labels, ids, draws, epoch, start) in zip(batches, arrays, strict=True):
            assert batch.images.device.type == device
            for tensor, array in (
                (batch.images, images),
                (batch.labels, labels),
                (batch.ids, ids),
                (batch.sources, ids),
            ):
                np.testing.assert_array_equal(tensor.cpu().numpy(), array)
            for name in ("y", "x", "flip", "shift"):
                np.testing.assert_array_equal(getattr(batch, name).cpu().numpy(), draws[name])
            assert (batch.epoch, batch.start) == (epoch, start)
            del batch


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_counts_what_was_handed_out(node_address: str, device: str) -> None:
    """An iterator that is restored between two batches continues with the second, however many were prefetched."""
    with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader:
        starts = [(b.epoch, b.start) for b in loader]
    for stop in (0, 1, 6, 11):
        with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
            head = [(b.epoch, b.start) for b in (next(batches) for _ in range(stop))]
            state = batches.state_dict()
        with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
            batches.load_state_dict(state)
            assert head + [(b.epoch, b.start) for b in batches] == starts


def test_a_missing_device_is_named(node_address: str) -> None:
    """The error names the device."""
    with Loader(node_address, timeout_s=20) as loader:
        for device in ("gpu", "mps", "cuda:99" if not torch.cuda.is_available() else "meta"):
            with pytest.raises(errors.OptionError, match=f"device='{device}'"):
                TensorLoader(loader, device)
