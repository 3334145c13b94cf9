"""The golden hashes are pinned, and change with any byte of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg

from loader_service.data import golden, kernel, order
from loader_service.data.codecs import CODECS, decode
from loader_service.data.records import Records
from loader_service.types import BUILTIN_GOLDEN


@pytest.fixture
def choose_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``choose_kernel(form)``: select a kernel form until the test ends."""

    def choose(form: str) -> None:
        monkeypatch.setenv(kernel.VARIABLE, form)
        kernel.chosen.cache_clear()

    yield choose
    monkeypatch.undo()
    kernel.chosen.cache_clear()


@pytest.mark.parametrize("form", kernel.FORMS)
def test_the_built_in_hash(form: str, choose_kernel: Callable[[str], None]) -> None:
    """Every kernel form makes the hash that clients demand."""
    choose_kernel(form)
    made = golden.installation()
    assert made.golden == BUILTIN_GOLDEN
    assert str(made) == f"numpy {np.__version__}, simplejpeg {simplejpeg.__version__}, kernel {form}"


def test_the_built_in_jpegs_are_the_pictures() -> None:
    """The built-in JPEGs decode to nearly the built-in images, which all differ."""
    for number, jpeg in enumerate(golden.jpegs()):
        pixels = decode(jpeg, CODECS["jpeg"], side=golden.SIDE_PX).astype(int)
        distances = [np.abs(pixels - golden.picture(other)).mean() for other in range(golden.PICTURES)]
        assert distances[number] < 6
        assert min(distances[:number] + distances[number + 1 :]) > 30


def test_a_decoder_of_other_bytes_is_noticed(other_decoder: None) -> None:
    """A decoder with a difference of one grey level in one pixel changes the hash."""
    assert golden.installation().golden != BUILTIN_GOLDEN


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
def test_a_decoder_of_windows_of_other_bytes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash also covers the decoder of windows."""
    true = kernel.decode_window

    def decode_window(
        payload: bytes, into: npt.NDArray[np.uint8], size: tuple[int, int], window: kernel.Window
    ) -> bool:
        done = true(payload, into, size, window)
        into[0] ^= 1
        return done

    monkeypatch.setattr(kernel, "decode_window", decode_window)
    assert golden.installation().golden != BUILTIN_GOLDEN


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash covers the limit TABLE_MAX, which changes the order."""
    monkeypatch.setattr(order, "TABLE_MAX", 70_000)
    assert golden.installation().golden != BUILTIN_GOLDEN


def test_the_golden_samples_of_a_dataset(dataset_dir: Path) -> None:
    """The hash of a dataset's samples agrees with its manifest and never changes."""
    with Records(dataset_dir / "train.lmdb") as records:
        assert golden.of_dataset(records) == records.manifest.golden == "8314fa572ad7a0456b746df0aa3232b4"
