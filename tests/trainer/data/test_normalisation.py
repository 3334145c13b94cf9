"""Subtraction of the mean image: the crop's own window, mirrored with it, or the centre."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data import normalisation
from trainer.data.normalisation import MeanSubtraction, Windows
from trainer.model.presets import PRESETS

CPU = torch.device("cpu")
PICTURES = 6


@pytest.fixture
def mean() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (256, 256, 3)).astype(np.float32)


@pytest.fixture
def windows() -> Windows:
    return Windows(
        y=torch.tensor([0, 32, 5, 0, 32, 17]),
        x=torch.tensor([0, 32, 9, 32, 0, 3]),
        flip=torch.tensor([False, True, True, True, False, True]),
    )


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (PICTURES, 224, 224, 3), np.uint8)


def test_paper_subtracts_the_crops_own_window(mean: np.ndarray, windows: Windows, pixels: np.ndarray) -> None:
    """A crop of the mean image itself, mirrored or not, becomes zero."""
    for i in range(PICTURES):
        y, x = windows.y[i], windows.x[i]
        crop = mean[y : y + 224, x : x + 224]
        pixels[i] = (crop[:, ::-1] if windows.flip[i] else crop).round().astype(np.uint8)
    (centred,) = MeanSubtraction(torch.from_numpy(mean), PRESETS["paper"], (CPU,))(
        (torch.from_numpy(pixels),), (windows,)
    )
    assert centred.abs().max() <= 0.5


def test_original_subtracts_the_centre(mean: np.ndarray, windows: Windows, pixels: np.ndarray) -> None:
    """Preset ``original`` subtracts the centre window from every crop."""
    (centred,) = MeanSubtraction(torch.from_numpy(mean), PRESETS["original"], (CPU,))(
        (torch.from_numpy(pixels),), (windows,)
    )
    expected = (pixels.astype(np.float32) - mean[16:240, 16:240]).transpose(0, 3, 1, 2)
    assert np.array_equal(centred.numpy(), expected)


def test_output_is_channels_last_float32(mean: np.ndarray, windows: Windows, pixels: np.ndarray) -> None:
    """The result has the layout of convolutions, without another copy."""
    (centred,) = MeanSubtraction(torch.from_numpy(mean), PRESETS["paper"], (CPU,))(
        (torch.from_numpy(pixels),), (windows,)
    )
    assert centred.shape == (PICTURES, 3, 224, 224)
    assert centred.dtype == torch.float32
    assert centred.is_contiguous(memory_format=torch.channels_last)


def test_both_ways_to_subtract_agree(mean: np.ndarray, windows: Windows, pixels: np.ndarray) -> None:
    """The CPU's loop and the GPU's indexing give the same bits."""
    both = torch.stack([torch.from_numpy(mean), torch.from_numpy(mean[:, ::-1].copy())])
    arguments = torch.from_numpy(pixels), both, windows.flip, windows.y, windows.x
    one, other = normalisation.subtract_by_loop(*arguments), normalisation.subtract_at_once(*arguments)
    assert torch.equal(one, other)
    assert one.stride() == other.stride()


def test_subtraction_does_not_wait_for_the_device(mean: np.ndarray, windows: Windows, pixels: np.ndarray) -> None:
    """All of it happens on the batch's device: no number is read back, and nothing comes from the host (here: meta)."""
    meta = torch.device("meta")
    for preset in PRESETS.values():
        subtract = MeanSubtraction(torch.from_numpy(mean), preset, (meta,))
        (centred,) = subtract((torch.from_numpy(pixels).to(meta),), (windows.to(meta),))
        assert centred.shape == (PICTURES, 3, 224, 224)
