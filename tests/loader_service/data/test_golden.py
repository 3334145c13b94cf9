"""The golden hashes: what they are, and that they notice other bytes."""

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
    """``choose_kernel(form)``: the inner loops run in that form until the test ends."""

    def choose(form: str) -> None:
        monkeypatch.setenv(kernel.VARIABLE, form)
        kernel.chosen.cache_clear()

    yield choose
    monkeypatch.undo()
    kernel.chosen.cache_clear()


@pytest.mark.parametrize("form", kernel.FORMS)
def test_the_built_in_hash(form: str, choose_kernel: Callable[[str], None]) -> None:
    """The hash that clients demand is the one that this code makes, in every form of its inner loops."""
    choose_kernel(form)
    made = golden.installation()
    assert made.golden == BUILTIN_GOLDEN
    assert str(made) == f"numpy {np.__version__}, simplejpeg {simplejpeg.__version__}, kernel {form}"


def test_the_built_in_jpegs_are_the_pictures() -> None:
    """Decoded, they are the pictures but for what JPEG loses; no two are alike."""
    for number, jpeg in enumerate(golden.jpegs()):
        pixels = decode(jpeg, CODECS["jpeg"], side=golden.SIDE_PX).astype(int)
        distances = [np.abs(pixels - golden.picture(other)).mean() for other in range(golden.PICTURES)]
        assert distances[number] < 6
        assert min(distances[:number] + distances[number + 1 :]) > 30


def test_a_decoder_of_other_bytes_is_noticed(other_decoder: None) -> None:
    """One pixel of one grey level is enough."""
    assert golden.installation().golden != BUILTIN_GOLDEN


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
def test_a_decoder_of_windows_of_other_bytes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves in place of libjpeg-turbo is told by the hash just as well."""
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
    """From how many records on the order is no table is part of what everybody must agree on."""
    monkeypatch.setattr(order, "TABLE_MAX", 70_000)
    assert golden.installation().golden != BUILTIN_GOLDEN


def test_the_golden_samples_of_a_dataset(dataset_dir: Path) -> None:
    """The hash in a manifest is that of the samples made now, and never changes."""
    with Records(dataset_dir / "train.lmdb") as records:
        assert golden.of_dataset(records) == records.manifest.golden == "8314fa572ad7a0456b746df0aa3232b4"
