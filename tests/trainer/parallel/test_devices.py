"""Devices: their choice, and the batch that fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trainer.errors import ConfigError, DeviceError
from trainer.parallel import devices
from trainer.parallel.devices import choose_devices, out_of_memory_error

GPU = torch.device("cuda", 0)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("gpus", "asked", "towers", "expected"),
    [
        (0, (), 2, ("cpu",)),
        (1, (), 2, ("cuda:0",)),
        (2, (), 2, ("cuda:0",)),
        (2, ("cuda:0", "cuda:1"), 2, ("cuda:0", "cuda:1")),
        (8, (), 2, ("cuda:0",)),
        (8, (), 1, ("cuda:0",)),
        (0, ("cpu", "cpu"), 2, ("cpu", "cpu")),
        (1, ("cuda", "cuda:0"), 2, ("cuda:0", "cuda:0")),
        (2, ("cpu",), 2, ("cpu",)),
    ],
)
def test_devices_are_what_the_machine_has_or_the_user_names(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: tuple[str, ...], towers: int, expected: tuple[str, ...]
) -> None:
    """The default is one GPU, or the CPU; the user's names take precedence."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert tuple(map(str, choose_devices(asked, towers))) == expected


@pytest.mark.parametrize(
    ("asked", "towers", "error"),
    [
        (("cuda:1",), 2, DeviceError),
        (("gpu",), 2, ConfigError),
        (("meta",), 2, ConfigError),
        (("cpu", "cpu", "cpu"), 2, ConfigError),
        (("cpu", "cpu"), 1, ConfigError),
    ],
)
def test_devices_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], towers: int, error: type[Exception]
) -> None:
    """Unknown, missing and too many devices are refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(error):
        choose_devices(asked, towers)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a GPU with 1,000 MiB, on which a network takes 100 MiB and each image 2."""
    monkeypatch.setattr(devices, "available_bytes", lambda _: 1000 * MIB)

    def peak(_: torch.device, trial: Callable[[int], None], images: int) -> int:
        trial(images)
        return (100 + 2 * images) * MIB

    monkeypatch.setattr(devices, "peak_bytes", peak)


@pytest.mark.usefixtures("gpu")
def test_a_batch_that_fits_is_named() -> None:
    """Two small steps give the recommendation: 90 % of 1,000 MiB, less 100, at 2 per image."""
    tried: list[int] = []
    error = out_of_memory_error(4096, [GPU, GPU], tried.append)
    assert "cuda:0 cannot be used: its memory is too small for a batch of 4096 images" in str(error)
    assert "about 400 images would fit: try --batch-size 400" in str(error)
    assert len(tried) == 2


@pytest.mark.usefixtures("gpu")
def test_what_failed_is_not_recommended() -> None:
    """The recommended batch is smaller than the one that failed."""
    assert "about 255 images" in str(out_of_memory_error(256, [GPU], lambda _: None))


@pytest.mark.usefixtures("gpu")
def test_a_network_that_does_not_fit_at_all() -> None:
    """No number is recommended if four images are too many or no trial is possible."""

    def fails(_: int) -> None:
        raise torch.cuda.OutOfMemoryError

    for trial in (fails, None):
        error = out_of_memory_error(256, [GPU], trial)
        assert "try a smaller --batch-size" in str(error)
        assert "would fit" not in str(error)
