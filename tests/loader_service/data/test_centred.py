"""Mean subtraction as stored pixels loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from loader_service.data.augment import complete_view
from loader_service.data.centred import FRACTION_BITS, centre_of, decode_centred, encode_centred
from loader_service.data.codecs import RAW_BYTES, SHAPE
from loader_service.data.fill import empty_slice, fill
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.records import Records
from loader_service.errors import RecordError
from loader_service.types import Dtype, SampleLayout, SliceId, View

MakeDataset = Callable[..., Manifest]


@pytest.mark.parametrize("mean", [0.0, 0.1, 127.49999, 254.996, 255.0])
def test_every_grey_level_comes_back(mean: float) -> None:
    """All 256 values, against means at both ends and between, are exact after encoding and decoding."""
    pixels = np.resize(np.arange(256, dtype=np.uint8), SHAPE)
    centre = centre_of(np.full(SHAPE, mean, np.float32))
    assert np.array_equal(decode_centred(encode_centred(pixels, centre), centre), pixels)


def test_what_is_stored_is_pixel_minus_mean(
    picture: Callable[[int], npt.NDArray[np.uint8]], statistics: Statistics
) -> None:
    """The stored numbers are the difference from the mean image, within half a unit."""
    payload = encode_centred(picture(3), centre_of(statistics.mean_image))
    stored = np.frombuffer(payload, "<i2").reshape(SHAPE) / 2**FRACTION_BITS
    difference = picture(3) - statistics.mean_image.astype(np.float64)
    assert np.abs(stored - difference).max() <= 0.5 / 2**FRACTION_BITS


@pytest.mark.parametrize("side", [256, 75])
@pytest.mark.parametrize("view", ["train", "center", "ten-crop", "whole"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_all_codecs_serve_the_same_slices(
    view: str, dtype: Dtype, side: int, tmp_path: Path, make_dataset: MakeDataset
) -> None:
    """Of equal pictures, centred records give the same bytes as raw ones, and JPEG ones nearly the same."""
    slices = {}
    for codec in ("raw", "centered", "jpeg"):
        make_dataset(tmp_path / codec, 12, codec, side=side)
        with Records(tmp_path / codec) as records:
            complete = complete_view(View.named(view, side), records.statistics)
            slices[codec] = empty_slice(SampleLayout(complete, dtype), 12)
            fill(slices[codec], records, SliceId(complete, 5, 1, 0, 12))
    assert np.array_equal(slices["centered"].images, slices["raw"].images)
    assert np.array_equal(slices["centered"].labels, slices["raw"].labels)
    assert np.array_equal(slices["centered"].draws, slices["raw"].draws)
    difference = np.abs(slices["jpeg"].images.astype(np.float64) - slices["raw"].images)
    assert 0 < difference.mean() < 32  # these pictures have edges between black and white, which JPEG smears


def test_a_payload_of_another_length_is_refused() -> None:
    """What cannot be centred pixels is an error and no picture."""
    with pytest.raises(ValueError, match="a centered payload has 393216 bytes, this one 5"):
        decode_centred(b"12345", np.zeros(SHAPE, np.int16))


def test_a_record_of_another_codec_is_named(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """A JPEG record in a centred dataset is an error that says what was expected."""
    make_dataset(tmp_path / "d", 2, "centered")
    with Records(tmp_path / "d") as records, records.values() as values:
        found = (0, 1, 0, memoryview(b"x"))
        with pytest.raises(RecordError, match="its codec number is 1, where the manifest says centered"):
            values.unpack(0, found, np.empty(16 + RAW_BYTES, np.uint8))
