"""The codecs: parts of JPEGs are decoded to the bytes of the whole, and centered records lose nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from loader_service.data import kernel
from loader_service.data.augment import complete_view
from loader_service.data.codecs import (
    CODECS,
    FRACTION_BITS,
    RAW_BYTES,
    SHAPE,
    centre_of,
    decode,
    decode_centred,
    encode,
    encode_centred,
    header,
    raw_bytes,
)
from loader_service.data.fill import empty_slice, fill
from loader_service.data.kernel import Window
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.records import Records
from loader_service.errors import RecordError
from loader_service.types import Dtype, SampleLayout, SliceId, View

MakeDataset = Callable[..., Manifest]
Picture = Callable[..., npt.NDArray[np.uint8]]
JPEG = CODECS["jpeg"]
SIDE = 256

in_part = pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")


@pytest.fixture
def choose_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``choose_form(form)``: select a kernel form until the test ends."""

    def choose(form: str) -> None:
        monkeypatch.setenv(kernel.VARIABLE, form)
        kernel.chosen.cache_clear()

    yield choose
    monkeypatch.undo()
    kernel.chosen.cache_clear()


def textured(side: int = SIDE, noise: float = 25.0) -> npt.NDArray[np.uint8]:
    """Return an image with edges, gradients and noise in all colours, (side, side, 3) uint8."""
    y, x, channel = np.ogrid[:side, :side, :3]
    wave = 128 + 100 * np.sin(x * (channel + 1) / 9 + y * y / 400) + 60 * ((x // 7 + y // 5 + channel) % 2)
    grain = np.random.default_rng(side).normal(0, noise, (side, side, 3))
    return np.clip(wave + grain, 0, 255).astype(np.uint8)


def saved(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    """Return a JPEG that Pillow writes with these options."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def check(payload: bytes, side: int, *windows: Window) -> None:
    """Check that windows are decoded in part, to the bytes of the whole, and that nothing is written outside of the record."""
    whole = simplejpeg.decode_jpeg(payload, colorspace="RGB")
    memory = np.full(raw_bytes(side) + 64, 0xA5, np.uint8)
    into = memory[32:-32]
    for window in windows:
        top, left, height, width = window
        part = np.s_[top : top + height, left : left + width]
        into[:] = 0xA5
        assert kernel.decode_window(payload, into, (side, side), window)
        assert np.array_equal(into.reshape(side, side, 3)[part], whole[part]), window
    assert (memory[:32] == 0xA5).all()
    assert (memory[-32:] == 0xA5).all()


@in_part
@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_every_place_of_a_crop(subsampling: str) -> None:
    """A crop's pixels are those of the whole image, wherever it begins within the units of the file."""
    payload = encode(textured(), "jpeg", {"quality": 90, "subsampling": subsampling})
    check(payload, SIDE, *((top, left, 224, 224) for top in range(33) for left in range(top % 2, 33, 2)))


@in_part
@pytest.mark.parametrize("side", [16, 17, 31, 40, 250, 256, 300])
@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_windows_of_any_size(side: int, subsampling: str, quality: int) -> None:
    """Windows of any size, at the edges and within, have the pixels of the whole, for records of any side."""
    payload = encode(textured(side), "jpeg", {"quality": quality, "subsampling": subsampling})
    rng = np.random.default_rng(quality)
    sizes = rng.integers(1, side + 1, (8, 2)).tolist()
    drawn = [(*rng.integers(0, (side - h + 1, side - w + 1)).tolist(), h, w) for h, w in sizes]
    check(payload, side, (0, 0, side, side), (side - 1, side - 1, 1, 1), *drawn)


@in_part
def test_every_colour() -> None:
    """All colours are converted to the same red, green and blue as by libjpeg-turbo."""
    steps = np.arange(0, 256, 8, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    for part in colours.reshape(8, 64, 64, 3):
        blocks = part.repeat(8, axis=0).repeat(8, axis=1)
        check(encode(blocks, "jpeg", {"quality": 100, "subsampling": "444"}), 512, (0, 0, 512, 512))


@in_part
@pytest.mark.parametrize("picture", [np.zeros, lambda *a: np.full(*a[:1], 255, np.uint8)], ids=["black", "white"])
def test_blocks_without_detail(picture: Callable[..., npt.NDArray[np.uint8]]) -> None:
    """Blocks with no coefficient but the mean are decoded."""
    check(encode(picture((64, 64, 3), np.uint8), "jpeg"), 64, (3, 5, 50, 40))


@in_part
@pytest.mark.parametrize("noise", [0.0, 200.0])
def test_tables_of_the_files_own(noise: float) -> None:
    """Huffman tables of one image do not serve for the next."""
    for picture in (textured(noise=noise), textured(noise=9.0)):
        check(saved(picture, quality=85, optimize=True), SIDE, (7, 9, 224, 224))
        check(saved(picture, quality=85), SIDE, (7, 9, 224, 224))


def without_segments(payload: bytes, marker: int) -> bytes:
    """Return a JPEG without its segments of one kind before the scan."""
    kept, at = payload[:2], 2
    while payload[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        kept += b"" if payload[at + 1] == marker else payload[at:end]
        at = end
    return kept + payload[at:]


@pytest.mark.parametrize("marker", [0xC4, 0xDB], ids=["codes", "quantisation"])
def test_tables_of_another_picture(marker: int) -> None:
    """A JPEG without tables is not decoded with those of the previous image."""
    payload, into = encode(textured(64), "jpeg"), np.zeros(raw_bytes(64), np.uint8)
    kernel.decode_window(payload, into, (64, 64), (0, 0, 64, 64))
    assert len(without_segments(payload, marker)) < len(payload) - 100
    assert not kernel.decode_window(without_segments(payload, marker), into, (64, 64), (0, 0, 64, 64))


@pytest.mark.parametrize(
    "payload",
    [
        saved(textured(64), progressive=True),
        saved(textured(64), restart_marker_rows=1),
        saved(textured(64)[:, :, 0]),
        bytes(simplejpeg.encode_jpeg(textured(64), colorspace="RGB", colorsubsampling="440")),
        bytes(simplejpeg.encode_jpeg(textured(64), colorspace="RGB", colorsubsampling="411")),
    ],
    ids=["progressive", "restarts", "grey", "440", "411"],
)
def test_other_kinds_of_jpegs_are_decoded_whole(payload: bytes) -> None:
    """JPEGs of other kinds are left to libjpeg-turbo, which decodes them whole."""
    into = np.zeros(raw_bytes(64), np.uint8)
    assert not kernel.decode_window(payload, into, (64, 64), (0, 0, 64, 64))
    whole = simplejpeg.decode_jpeg(payload, colorspace="RGB")
    np.testing.assert_array_equal(decode(payload, JPEG, into, side=64, window=(5, 6, 7, 8)), whole)


@pytest.mark.parametrize("form", kernel.FORMS)
def test_all_forms_give_the_same_window(form: str, choose_form: Callable[[str], None]) -> None:
    """All forms decode the same pixels in a window."""
    choose_form(form)
    assert not (kernel.decodes_windows() and form in ("c", "numpy"))
    payload = encode(textured(), "jpeg")
    part = np.s_[9:233, 30:254]
    pixels = decode(payload, JPEG, side=SIDE, window=(9, 30, 224, 224))
    np.testing.assert_array_equal(pixels[part], decode(payload, JPEG, side=SIDE)[part])


def without_end(payload: bytes) -> bytes:
    """Cut a JPEG off within its last unit."""
    return payload[:-20]


def with_a_marker(payload: bytes) -> bytes:
    """Insert a marker into the middle of the coded bytes."""
    middle = len(payload) // 2
    return payload[:middle] + b"\xff\xd0" + payload[middle:]


def with_more(payload: bytes) -> bytes:
    """Add coded bytes after the last unit."""
    return payload[:-2] + b"\x55" * 20 + payload[-2:]


@pytest.mark.parametrize("damage", [without_end, with_a_marker, with_more])
def test_damage_gives_the_same_error_for_every_window(damage: Callable[[bytes], bytes]) -> None:
    """A damaged JPEG gives the same error for any window as for the whole image."""
    damaged = damage(encode(textured(), "jpeg"))
    with pytest.raises(ValueError, match="its JPEG cannot be decoded") as whole:
        decode(damaged, JPEG, side=SIDE)
    with pytest.raises(ValueError, match="its JPEG cannot be decoded") as part:
        decode(damaged, JPEG, side=SIDE, window=(0, 0, 8, 8))
    assert str(part.value) == str(whole.value)


def with_profile(payload: bytes, *parts: tuple[int, int]) -> bytes:
    """Insert a colour profile of these parts, each with its number and the number of all parts."""
    content = [b"ICC_PROFILE\0" + bytes(part) + b"profile" for part in parts]
    return payload[:2] + b"".join(b"\xff\xe2\0" + bytes((len(each) + 2,)) + each for each in content) + payload[2:]


@pytest.mark.parametrize("form", kernel.FORMS)
def test_a_damaged_profile_is_an_error_in_all_forms(form: str, choose_form: Callable[[str], None]) -> None:
    """A JPEG whose colour profile lacks a part, or has one twice, is bad on every machine; with a sound one it is good."""
    choose_form(form)
    payload = encode(textured(64), "jpeg")
    for sound in (((1, 1),), ((1, 2), (2, 2)), ()):
        decode(with_profile(payload, *sound), JPEG, side=64, window=(0, 0, 8, 8))
    for damaged in (((1, 2),), ((1, 1), (1, 1)), ((0, 1),), ((2, 1),), ((1, 0),), ((1, 2), (2, 3))):
        with pytest.raises(ValueError, match="its JPEG cannot be decoded"):
            decode(with_profile(payload, *damaged), JPEG, side=64, window=(0, 0, 8, 8))


def test_a_jpeg_of_another_side() -> None:
    """A JPEG of another side is refused with both sizes, for a window too."""
    with pytest.raises(ValueError, match=r"\(64, 64, 3\), not \(128, 128, 3\)"):
        decode(encode(textured(64), "jpeg"), JPEG, side=128, window=(0, 0, 8, 8))


@in_part
@pytest.mark.parametrize("window", [(-1, 0, 8, 8), (0, 57, 8, 8), (0, 0, 65, 8), (0, 0, 8, 0), (2**31 - 1, 0, 8, 8)])
def test_a_window_beyond_the_record_is_refused(window: Window) -> None:
    """A window outside of the record is refused, and nothing is written."""
    into = np.zeros(raw_bytes(64), np.uint8)
    with pytest.raises(ValueError, match="does not lie within 64 x 64 pixels"):
        kernel.decode_window(encode(textured(64), "jpeg"), into, (64, 64), window)
    assert not into.any()


@in_part
def test_a_buffer_of_another_size_is_refused() -> None:
    """A buffer of another size than the record's is refused."""
    with pytest.raises(ValueError, match="12287 bytes are no room for 64 x 64 pixels"):
        kernel.decode_window(
            encode(textured(64), "jpeg"), np.zeros(raw_bytes(64) - 1, np.uint8), (64, 64), (0, 0, 8, 8)
        )


@pytest.mark.parametrize("mean", [0.0, 0.1, 127.49999, 254.996, 255.0])
def test_every_grey_level_comes_back(mean: float) -> None:
    """All 256 grey levels are exact after encoding and decoding, for any mean."""
    pixels = np.resize(np.arange(256, dtype=np.uint8), SHAPE)
    centre = centre_of(np.full(SHAPE, mean, np.float32))
    assert np.array_equal(decode_centred(encode_centred(pixels, centre), centre), pixels)


def test_centered_payloads_are_pixel_minus_mean(
    picture: Callable[[int], npt.NDArray[np.uint8]], statistics: Statistics
) -> None:
    """The stored numbers are pixel minus mean image, within half a unit."""
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
    """For the same images, centered records give the same bytes as raw records, and jpeg records nearly the same."""
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
    """A payload of another length is an error."""
    with pytest.raises(ValueError, match="a centered payload has 393216 bytes, this one 5"):
        decode_centred(b"12345", np.zeros(SHAPE, np.int16))


def test_a_record_of_another_codec_is_named(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """The error for a jpeg record in a centered dataset names the expected codec."""
    make_dataset(tmp_path / "d", 2, "centered")
    with Records(tmp_path / "d") as records, records.values() as values:
        found = memoryview(header(0, "jpeg", b"x") + b"x")
        with pytest.raises(RecordError, match="its codec number is 1, but the manifest says centered"):
            values.unpack(0, found, np.empty(16 + RAW_BYTES, np.uint8))
