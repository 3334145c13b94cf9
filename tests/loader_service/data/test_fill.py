"""A slice's bytes are a pure function of dataset, view, seed, epoch, start and count."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_service.data.augment import complete_view
from loader_service.data.checksums import seal
from loader_service.data.codecs import HEADER, RAW_BYTES
from loader_service.data.draws import draw
from loader_service.data.fill import Stage, Stopwatch, empty_slice, fill, slice_numbers
from loader_service.data.manifest import Manifest
from loader_service.data.records import KEY, Records
from loader_service.errors import RecordError
from loader_service.types import STAGES, VIEWS, Dtype, SampleLayout, Slice, SliceId, StageSeconds, View

MakeDataset = Callable[..., Manifest]
Picture = Callable[..., npt.NDArray[np.uint8]]


@pytest.fixture(scope="module")
def records(dataset_dir: Path) -> Iterator[Records]:
    with Records(dataset_dir / "train.lmdb") as opened:
        yield opened


def made(records: Records, view: View, start: int, count: int, dtype: Dtype = "uint8", **key: int) -> Slice:
    """Make a slice in new arrays."""
    what = SliceId(complete_view(view, records.statistics), key.get("seed", 2012), key.get("epoch", 60), start, count)
    out = empty_slice(SampleLayout(what.view, dtype), count)
    fill(out, records, what)
    return out


def digest(out: Slice) -> str:
    """Return the hash of all bytes of a slice."""
    return hashlib.sha256(b"".join(a.tobytes() for a in (out.images, out.labels, out.draws))).hexdigest()


@pytest.mark.parametrize(
    ("view", "dtype", "expected"),
    [
        (View(), "uint8", "95b392e9a47f4cc6c14c863c088a85e67867cafb19036f5c079f411f5728b49d"),
        (View(), "float16", "eb2d8b428dee54d67284f836aef0b3b78d6d7ceb43b95438940627b0e58a9331"),
        (View(), "float32", "442c79727f430f287997a6e9e7cf951ed40158a3eb14ab7f6018f5b084bfd8c3"),
        (
            View(crop=100, flip=False, jitter=1.5),
            "uint8",
            "07159829856cf6df9f91883bea6370f0eb3dedb868110d568fe04fbac5909c7d",
        ),
        (VIEWS["center"], "uint8", "558ef0f9c00b1c69080511aa9c84b554f2bf1e30b8300b6227aa9e81478c1403"),
        (VIEWS["ten-crop"], "uint8", "7073c9ab00eaeb9eee3c91a805aaf852dd7b1d614ae182836e816e507959911a"),
        (VIEWS["whole"], "float32", "13ecb33d17f1772f230ba74f66891a0fb2535fbfdd298a3639552673e1502eee"),
    ],
)
def test_golden_slices(records: Records, view: View, dtype: Dtype, expected: str) -> None:
    """The bytes of these slices are the same on every machine and never change."""
    assert digest(made(records, view, 7, 9, dtype)) == expected


@settings(max_examples=25)
@given(
    start=st.integers(0, 300),
    data=st.data(),
    seed=st.integers(0, 2**64 - 1),
    dtype=st.sampled_from(get_args(Dtype)),
)
def test_two_cuts_of_the_same_positions_agree(
    records: Records, start: int, data: st.DataObject, seed: int, dtype: Dtype
) -> None:
    """A sample's bytes do not depend on how positions are cut into slices."""
    count = data.draw(st.integers(0, min(12, 300 - start)))
    cut = data.draw(st.integers(0, count))
    whole = made(records, View(), start, count, dtype, seed=seed)
    first = made(records, View(), start, cut, dtype, seed=seed)
    second = made(records, View(), start + cut, count - cut, dtype, seed=seed)
    for name in ("images", "labels", "draws"):
        assert getattr(first, name).tobytes() + getattr(second, name).tobytes() == getattr(whole, name).tobytes()


def test_an_epoch_has_every_record_once(records: Records) -> None:
    """An epoch has every record once, in the order of records_at()."""
    numbers = slice_numbers(300, SliceId(View(), 1, 2, 0, 300))
    assert sorted(numbers.tolist()) == list(range(300))
    assert made(records, View(), 0, 300, seed=1, epoch=2).labels.tolist() == (numbers % 3).tolist()


def test_seed_and_epoch_are_not_added(records: Records) -> None:
    """Seed 0 in epoch 1 and seed 1 in epoch 0 give different samples."""
    assert digest(made(records, View(), 0, 4, seed=0, epoch=1)) != digest(made(records, View(), 0, 4, seed=1, epoch=0))


@pytest.mark.parametrize(("side", "crop"), [(8, 7), (64, 56), (99, 87), (320, 280)])
def test_records_of_other_sides(
    side: int, crop: int, tmp_path: Path, make_dataset: MakeDataset, picture: Picture
) -> None:
    """Records of any side are cropped by their draws, to 7/8 by default, and the mean's window is subtracted."""
    make_dataset(tmp_path / "d", 5, side=side)
    with Records(tmp_path / "d") as records:
        mean = records.statistics.mean_image
        for view, cut in ((View.named("train", side), crop), (View(crop=5), 5), (View.named("ten-crop", side), crop)):
            out, floats = made(records, view, 0, 5), made(records, view, 0, 5, "float32")
            numbers = slice_numbers(5, SliceId(view, 2012, 60, 0, 5)).repeat(view.crops_per_record)
            draws, images = out.draws.ravel(), out.images.reshape(-1, cut, cut, 3)
            centred = floats.images.reshape(images.shape)
            for i, number in enumerate(numbers.tolist()):
                y, x, flip, shift = draws[i].tolist()
                step = -1 if flip else 1
                window = picture(number, side)[y : y + cut, x : x + cut].astype(int)[:, ::step]
                assert np.array_equal(images[i], np.clip(window + shift, 0, 255))
                assert np.array_equal(centred[i], images[i] - mean[y : y + cut, x : x + cut][:, ::step])
        assert np.array_equal(made(records, VIEWS["whole"], 2, 1).images[0], picture(2, side))
        places = {
            draw for epoch in range(60) for draw in made(records, View(crop=side - 2), 0, 5, epoch=epoch).draws["x"]
        }
        assert places == {0, 1, 2}


def test_a_view_that_does_not_fit_the_records_is_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """A crop larger than the records, or a whole view of another side, is refused before anything is read."""
    make_dataset(tmp_path / "d", 2, side=64)
    with Records(tmp_path / "d") as records:
        with pytest.raises(ValueError, match="a crop of 65 pixels does not fit into records of 64"):
            made(records, View(crop=65), 0, 1)
        for view in (View(crop=65, jitter=0), msgspec.structs.replace(VIEWS["whole"], crop=63)):
            with pytest.raises(ValueError, match=rf"of {view.crop} pixels does not fit records of 64"):
                fill(empty_slice(SampleLayout(view, "uint8"), 1), records, SliceId(view, 0, 0, 0, 1))


def test_a_training_sample_is_its_draws_applied_to_its_record(records: Records, picture: Picture) -> None:
    """A training sample is its position's record, cropped, mirrored and shifted by its draws."""
    out = made(records, View(), 20, 6)
    numbers = slice_numbers(300, SliceId(View(), 2012, 60, 20, 6))
    for i, number in enumerate(numbers.tolist()):
        y, x, flip, shift = out.draws[i].tolist()
        window = picture(number)[y : y + 224, x : x + 224].astype(int)
        assert np.array_equal(out.images[i], np.clip((window[:, ::-1] if flip else window) + shift, 0, 255))


def test_the_centre_crop(records: Records, picture: Picture) -> None:
    """The center view gives the centre of each record, in sequential order."""
    out = made(records, VIEWS["center"], 5, 3)
    for i in range(3):
        assert np.array_equal(out.images[i], picture(5 + i)[16:240, 16:240])


def test_the_ten_crops(records: Records, picture: Picture) -> None:
    """A ten-crop sample is four corners and the centre, then their mirror images."""
    image, pixels = made(records, VIEWS["ten-crop"], 8, 1).images[0], picture(8)
    corners = [pixels[:224, :224], pixels[:224, 32:], pixels[32:, :224], pixels[32:, 32:], pixels[16:240, 16:240]]
    for i, crop in enumerate(corners):
        assert np.array_equal(image[i], crop)
        assert np.array_equal(image[5 + i], crop[:, ::-1])


def test_the_whole_record(records: Records, picture: Picture) -> None:
    """The whole view gives the whole record."""
    assert np.array_equal(made(records, VIEWS["whole"], 11, 1).images[0], picture(11))


@pytest.mark.parametrize("view", [View(), *(VIEWS[name] for name in ("center", "ten-crop", "whole"))])
def test_float32_is_uint8_minus_the_means_window(records: Records, view: View) -> None:
    """A float32 sample is the uint8 sample minus the mean's window, mirrored with the image."""
    bytes_, floats = made(records, view, 3, 4), made(records, view, 3, 4, "float32")
    side, mean = view.shape[-2], records.statistics.mean_image
    assert bytes_.draws.tobytes() == floats.draws.tobytes()
    pairs = zip(bytes_.images.reshape(-1, side, side, 3), floats.images.reshape(-1, side, side, 3), strict=True)
    for drawn, (pixels, centred) in zip(floats.draws.ravel(), pairs, strict=True):
        y, x = int(drawn["y"]), int(drawn["x"])
        window = mean[y : y + side, x : x + side]
        assert np.array_equal(centred, pixels.astype(np.float32) - (window[:, ::-1] if drawn["flip"] else window))


def test_float16_is_the_nearest_to_float32(records: Records) -> None:
    """A float16 sample is the rounded float32 sample."""
    halves, floats = (made(records, View(), 3, 4, dtype) for dtype in ("float16", "float32"))
    assert halves.images.dtype == np.float16
    assert np.array_equal(halves.images, floats.images.astype(np.float16))


def test_jpeg_records_give_the_decoded_pixels(tmp_path: Path, make_dataset: Callable[..., object]) -> None:
    """A sample of a jpeg record is a crop of the record's decoded pixels."""
    make_dataset(tmp_path / "d", 4, "jpeg")
    with Records(tmp_path / "d") as records:
        out = made(records, VIEWS["center"], 0, 4)
        for i in range(4):
            label, pixels = records.pixels(i)
            assert out.labels[i] == label
            assert np.array_equal(out.images[i], pixels[16:240, 16:240])


def test_every_byte_of_the_draws_is_decided(records: Records) -> None:
    """The padding between the draws' fields is written too, so a used slot gives the same bytes."""
    what = SliceId(complete_view(View(), records.statistics), 1, 1, 0, 5)
    out = empty_slice(SampleLayout(what.view, "uint8"), 5)
    out.draws.view(np.uint8)[...] = 0xFF
    fill(out, records, what)
    assert out.draws.tobytes() == draw(what.view, 1, 1, 0, 5).tobytes()


@pytest.mark.parametrize("view", [View(order="sequential"), View()])
def test_a_slice_beyond_the_epoch_is_refused(records: Records, view: View) -> None:
    """Positions outside of the epoch are an error."""
    with pytest.raises(ValueError, match=r"positions 299 to 301 are not within an epoch of 300"):
        made(records, view, 299, 2)


def damage(path: Path, number: int, change: Callable[[bytes], bytes], new_number: int | None = None) -> None:
    """Change one record's value or number, but not the manifest; its checksums are those of the new value."""
    with lmdb.open(str(path), max_dbs=3, map_size=2**30) as env, env.begin(write=True) as txn:
        database = env.open_db(b"records", txn=txn)
        value = bytearray(change(txn.pop(KEY.pack(number), db=database)))
        if len(value) > HEADER.size:
            struct.pack_into("<Q", value, 8, xxhash.xxh3_64_intdigest(value[HEADER.size :]))
            seal(number, value)
        txn.put(KEY.pack(number if new_number is None else new_number), bytes(value), db=database)
    (path / "lock.mdb").unlink()


@pytest.mark.parametrize(
    ("codec", "change", "reason"),
    [
        ("raw", lambda v: v[:-1], f"a raw payload has {RAW_BYTES} bytes, this one {RAW_BYTES - 1}"),
        ("raw", lambda v: v + b"x", f"a raw payload has {RAW_BYTES} bytes, this one {RAW_BYTES + 1}"),
        ("raw", lambda v: v[:5], "it has 5 bytes, fewer than its header"),
        ("raw", lambda v: v[:4] + b"\x09" + v[5:], "its codec number is 9, but the manifest says raw"),
        ("raw", lambda v: v[:4] + b"\x01" + v[5:], "its codec number is 1, but the manifest says raw"),
        ("raw", lambda v: b"\x03" + v[1:], "its label 3 is beyond the last class"),
        ("jpeg", lambda v: v[:4] + b"\x00" + v[5:], "its codec number is 0, but the manifest says jpeg"),
        ("jpeg", lambda v: v[:2000], "its JPEG cannot be decoded .*Premature end"),
        ("jpeg", lambda v: v[:16] + b"no jpeg at all", "its JPEG cannot be decoded"),
    ],
)
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_a_bad_record_is_named(
    tmp_path: Path, make_dataset: Callable[..., object], codec: str, change: Callable, reason: str, dtype: Dtype
) -> None:
    """The error for a bad record has its number and the reason."""
    make_dataset(tmp_path / "d", 5, codec)
    damage(tmp_path / "d", 3, change)
    with Records(tmp_path / "d") as records:
        with pytest.raises(RecordError, match=f"record 3 of {records.path} cannot be used: .*{reason}") as caught:
            made(records, VIEWS["center"], 0, 5, dtype)
        assert caught.value.record == 3


def test_a_missing_record_is_named(tmp_path: Path, make_dataset: Callable[..., object]) -> None:
    """The error for a missing record has its number, and so has ``at``."""
    make_dataset(tmp_path / "d", 5)
    damage(tmp_path / "d", 3, bytes, new_number=2**40)
    view, at = VIEWS["center"], np.full(1, -1, np.int64)
    out = empty_slice(SampleLayout(view, "uint8"), 5)
    with (
        Records(tmp_path / "d") as records,
        pytest.raises(RecordError, match=r"record 3 of .* there is no such record"),
    ):
        fill(out, records, SliceId(view, 0, 0, 0, 5), at)
    assert at[0] == 3


def test_at_is_the_record_being_worked_on(records: Records) -> None:
    """After a slice, ``at`` holds the slice's last record."""
    what = SliceId(complete_view(View(), records.statistics), 1, 1, 0, 5)
    at = np.full(1, -1, np.int64)
    fill(empty_slice(SampleLayout(what.view, "uint8"), 5), records, what, at)
    assert at[0] == slice_numbers(300, what)[-1]


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_the_stages_make_up_the_whole(make_dataset: MakeDataset, tmp_path: Path, codec: str) -> None:
    """Read, decode and augment add up to a slice's time; raw records have none once they are compared, jpeg records mostly decoding."""
    make_dataset(tmp_path / "train.lmdb", 128, codec)
    watch = Stopwatch()
    out = empty_slice(SampleLayout(VIEWS["center"], "uint8"), 128)
    runs: list[tuple[float, StageSeconds]] = []  # several, for a busy machine may take the processor away in any one
    with Records(tmp_path / "train.lmdb") as records:
        for _ in range(5):
            start = time.perf_counter()
            fill(out, records, SliceId(VIEWS["center"], 0, 0, 0, 128), stopwatch=watch)
            stages = watch.stop()
            whole = time.perf_counter() - start
            assert stages.read + stages.decode + stages.augment <= whole
            runs.append((whole, stages))
    whole, stages = min(runs, key=lambda run: run[0])
    assert stages.read + stages.decode + stages.augment > 0.8 * whole
    assert (stages.decode > stages.augment) == (codec == "jpeg")
    assert (stages.decode == 0) == (codec == "raw")


def test_the_stage_is_shown_while_it_lasts() -> None:
    """The shared number shows the current stage, and none after the end."""
    shown = np.zeros(1, np.int64)
    watch = Stopwatch(shown)
    seen = [int(shown[0])]
    for stage in (Stage.READ, Stage.DECODE):
        watch.enter(stage)
        seen.append(int(shown[0]))
    watch.stop()
    assert [*seen, int(shown[0])] == [Stage.NONE, Stage.READ, Stage.DECODE, Stage.NONE]


def test_it_starts_anew_after_a_stop() -> None:
    """stop() resets the seconds, and StageSeconds are added field by field."""
    watch = Stopwatch()
    watch.enter(Stage.READ)
    first = watch.stop()
    assert first.read > 0
    assert watch.stop() == StageSeconds()
    assert STAGES == ("read", "decode", "augment")
    assert StageSeconds(1, 2, 3) + StageSeconds(10, 20, 30) == StageSeconds(11, 22, 33)
    assert StageSeconds(11, 22, 33) - StageSeconds(10, 20, 30) == StageSeconds(1, 2, 3)
