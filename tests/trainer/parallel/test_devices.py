"""Which devices are taken, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError, DeviceError
from trainer.parallel.devices import Stager, choose_devices

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "asked", "towers", "expected"),
    [
        (0, (), 2, ("cpu",)),
        (1, (), 2, ("cuda:0",)),
        (2, (), 2, ("cuda:0", "cuda:1")),
        (8, (), 2, ("cuda:0", "cuda:1")),
        (8, (), 1, ("cuda:0",)),
        (0, ("cpu", "cpu"), 2, ("cpu", "cpu")),
        (1, ("cuda", "cuda:0"), 2, ("cuda:0", "cuda:0")),
        (2, ("cpu",), 2, ("cpu",)),
    ],
)
def test_devices_are_what_the_machine_has_or_the_user_names(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: tuple[str, ...], towers: int, expected: tuple[str, ...]
) -> None:
    """By default two GPUs, one, or the CPU."""
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
    """A name that is no device, one that is not here, or too many."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(error):
        choose_devices(asked, towers)


def test_the_cpu_gets_no_copy() -> None:
    """The tensor is the loader's own memory, once for each tower."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    one, other = Stager((CPU, CPU)).put(array)
    array[0, 0] = 7
    assert one[0, 0] == 7
    assert other.data_ptr() == one.data_ptr() == array.ctypes.data
