"""What would fit, on a GPU made up of two numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trainer.parallel import memory
from trainer.parallel.memory import too_large

MIB = 1 << 20
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 1,000 MiB, on which a network takes 100 MiB and each image 2."""
    monkeypatch.setattr(memory, "room_bytes", lambda _: 1000 * MIB)

    def peak(_: torch.device, trial: Callable[[int], None], images: int) -> int:
        trial(images)
        return (100 + 2 * images) * MIB

    monkeypatch.setattr(memory, "peak_bytes", peak)


@pytest.mark.usefixtures("gpu")
def test_a_batch_that_fits_is_named() -> None:
    """By two small steps: 90 % of 1,000 MiB, less 100, at 2 for each image."""
    tried: list[int] = []
    error = too_large(4096, [GPU, GPU], tried.append)
    assert "cuda:0 cannot be used: its memory is too small for a batch of 4096 images" in str(error)
    assert "about 400 images would fit: try --batch-size 400" in str(error)
    assert len(tried) == 2


@pytest.mark.usefixtures("gpu")
def test_what_failed_is_not_recommended() -> None:
    """However much room there seems to be."""
    assert "about 255 images" in str(too_large(256, [GPU], lambda _: None))


@pytest.mark.usefixtures("gpu")
def test_a_network_that_does_not_fit_at_all() -> None:
    """When even four images are too many, or nothing can be tried, no number is made up."""

    def fails(_: int) -> None:
        raise torch.cuda.OutOfMemoryError

    for trial in (fails, None):
        error = too_large(256, [GPU], trial)
        assert "try a smaller --batch-size" in str(error)
        assert "would fit" not in str(error)
