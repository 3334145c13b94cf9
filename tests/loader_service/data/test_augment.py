"""The augmentation of a sample follows its definition, in every form of the kernel."""

from __future__ import annotations

import ctypes
import mmap
from typing import get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_service.data import kernel
from loader_service.data.augment import augment, augment_records, centre, complete_view
from loader_service.data.codecs import HEADER, RAW_BYTES, SHAPE
from loader_service.data.manifest import Statistics
from loader_service.types import DRAWS, VIEWS, Dtype, View

COMPILED = [form for form in kernel.FORMS if form != "numpy"]
PIXELS = np.random.Generator(np.random.Philox(1)).integers(0, 256, SHAPE, np.uint8)

shifts = st.integers(-255, 255) | st.sampled_from([0, -255, 255])


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, npt.NDArray[np.void]]:
    """Generate the side of a crop and a DRAWS that fits it."""
    side = draw(st.integers(1, 256) | st.just(224))
    places = st.integers(0, 256 - side)
    values = (draw(places), draw(places), draw(st.booleans()), (draw(shifts), draw(shifts), draw(shifts)))
    return side, np.array(values, DRAWS)[()]


def defined(side: int, drawn: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Return a sample by its definition: crop, mirror, add, and clip to 0..255."""
    y, x = int(drawn["y"]), int(drawn["x"])
    window = PIXELS[y : y + side, x : x + side].astype(np.int64)
    return np.clip((window[:, ::-1] if drawn["flip"] else window) + drawn["shift"], 0, 255)


@given(cases())
def test_a_sample_is_crop_flip_and_saturated_shift(case: tuple[int, npt.NDArray[np.void]]) -> None:
    """The result of any crop, flip and shift follows the definition."""
    side, drawn = case
    out = np.full((side, side, 3), 77, np.uint8)
    augment(out, PIXELS, drawn)
    assert np.array_equal(out, defined(side, drawn))


@given(cases())
def test_centring_subtracts_the_window_that_was_cut(case: tuple[int, npt.NDArray[np.void]]) -> None:
    """The float32 sample is the uint8 sample minus the mean's window at the same place, mirrored with it."""
    side, drawn = case
    mean = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) / 1024
    sample, out = np.empty((side, side, 3), np.uint8), np.empty((side, side, 3), np.float32)
    augment(sample, PIXELS, drawn)
    centre(out, sample, mean, drawn)
    y, x = int(drawn["y"]), int(drawn["x"])
    columns = range(x, x + side)
    if drawn["flip"]:
        columns = columns[::-1]
    assert np.array_equal(out, sample.astype(np.float32) - mean[y : y + side, list(columns)])


def raw(label: int, roll: int = 0, codec: int = 0, side: int = 256) -> memoryview:
    """Return a stored raw record."""
    pixels = np.roll(np.resize(PIXELS, (side, side, 3)), roll, axis=0)
    return memoryview(HEADER.pack(label, codec, 0) + pixels.tobytes())


class Case:
    """The arguments of augment_records, with guard bytes around images that start ``skew`` bytes into a cache line."""

    GUARD_BYTES, LINE_BYTES = 128, 64

    def __init__(
        self, drawn: npt.NDArray[np.void], side: int, dtype: Dtype, record_side: int = 256, skew: int = 0
    ) -> None:
        n = len(drawn)
        size = drawn.size * side * side * 3 * np.dtype(dtype).itemsize + 2 * self.GUARD_BYTES
        memory = np.full(size + self.LINE_BYTES, 0xA5, np.uint8)
        first = (skew - memory.ctypes.data) % self.LINE_BYTES
        self.memory = memory[first : first + size]
        inner = self.memory[self.GUARD_BYTES : -self.GUARD_BYTES].view(dtype)
        self.images = inner.reshape(*drawn.shape, side, side, 3)
        self.values = [raw(label=3 * i + 2**31, roll=i, side=record_side) for i in range(n)]
        self.draws, self.labels, self.numbers = drawn, np.zeros(n, np.int64), np.arange(100, 100 + n)
        self.at, self.record_side = np.full(1, -1, np.int64), record_side
        mean = np.arange(3 * record_side**2, dtype=np.float32).reshape(record_side, record_side, 3) / 1024
        self.mean = np.ascontiguousarray(np.stack((mean, mean[:, ::-1]))) if dtype != "uint8" else None

    def run(self, form: str) -> int:
        return augment_records(
            self.images,
            self.values,
            self.draws,
            self.labels,
            self.numbers,
            self.at,
            self.mean,
            record_side=self.record_side,
            form=form,
        )


@st.composite
def slices(draw: st.DrawFn) -> tuple[npt.NDArray[np.void], int, Dtype, int, int]:
    """DRAWS of (n,) or (n, samples), a crop's side, the pixels' dtype, the records' side, and where images begin.

    If two rows are whole cache lines and the images start at one, some forms use non-temporal stores.
    """
    record_side = draw(st.just(256) | st.integers(8, 320))
    whole = min(224, record_side)
    lines = st.sampled_from([side for side in (32, 64, 96) if side <= record_side] or [whole])
    side = draw(st.integers(1, min(100, record_side)) | st.sampled_from([whole, record_side]) | lines)
    places = st.integers(0, record_side - side) | st.sampled_from([0, record_side - side])
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    n = int(np.prod(shape))
    sample = st.tuples(places, places, st.booleans(), st.tuples(shifts, shifts, shifts))
    values = draw(st.lists(sample, min_size=n, max_size=n))
    skew = draw(st.sampled_from([0, 0, 4, 32]))
    return np.array(values, DRAWS).reshape(shape), side, draw(st.sampled_from(get_args(Dtype))), record_side, skew


@pytest.mark.parametrize("form", COMPILED)
@given(slices())
def test_every_form_makes_the_same_bytes(form: str, case: tuple[npt.NDArray[np.void], int, Dtype, int, int]) -> None:
    """Each compiled form writes the same bytes as the NumPy form, and none outside of the images."""
    ours, theirs = Case(*case), Case(*case)
    assert ours.run(form) == theirs.run("numpy") == len(ours.values)
    assert ours.memory.tobytes() == theirs.memory.tobytes()
    assert ours.labels.tolist() == theirs.labels.tolist() == [3 * i + 2**31 for i in range(len(ours.values))]
    assert ours.at.tolist() == theirs.at.tolist()


@pytest.mark.parametrize("form", COMPILED)
def test_float16_is_the_nearest_to_float32(form: str) -> None:
    """float16 output is rounded as NumPy does, for all magnitudes, ties, subnormals, infinities and NaNs."""
    bits = np.random.default_rng(5).integers(0, 2**32, 3 * 256**2, np.uint32)
    wanted = bits.view(np.float32)
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    wanted[: len(halves)] = halves
    wanted[len(halves) : 2 * len(halves) - 1] = (halves[1:] + halves[:-1]) / 2  # ties
    case = Case(np.zeros(1, DRAWS), 256, "float16")
    case.values = [memoryview(HEADER.pack(0, 0, 0) + bytes(3 * 256**2))]
    case.mean = np.stack([-wanted.reshape(256, 256, 3)] * 2)
    case.run(form)
    with np.errstate(over="ignore"):
        nearest = wanted.astype(np.float16)
    assert np.array_equal(case.images.ravel(), nearest, equal_nan=True)


DRAW = np.array([(0, 32, False, (1, 2, 3)), (32, 0, True, (-1, -2, -3)), (5, 6, False, (0, 0, 0))], DRAWS)


@pytest.mark.parametrize("form", kernel.FORMS)
@pytest.mark.parametrize(
    "flaw", [raw(0, codec=1), raw(0)[:-1], memoryview(bytes(raw(0)) + b"x"), memoryview(b"short"), memoryview(b"")]
)
def test_a_record_that_is_not_raw_ends_the_slice(form: str, flaw: memoryview) -> None:
    """Records before a bad one are made, ``at`` holds the bad record's number, and the count is its index."""
    whole, cut = Case(DRAW, 224, "uint8"), Case(DRAW, 224, "uint8")
    whole.run(form)
    cut.values[1] = flaw
    assert cut.run(form) == 1
    assert cut.at[0] == 101
    assert np.array_equal(cut.images[0], whole.images[0])
    assert (cut.images[1:] == 0xA5).all()


@pytest.mark.parametrize("form", kernel.FORMS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("y", 33), ("x", 33), ("y", -1), ("x", -32768), ("shift", 256), ("shift", -256), ("shift", -32768)],
)
def test_a_draw_outside_the_record_is_refused(form: str, field: str, value: int) -> None:
    """Draws that do not fit the record are refused before anything is written."""
    case = Case(DRAW.copy(), 224, "uint8")
    case.draws[field][1] = value
    with pytest.raises(ValueError, match=r"draw 1 .* does not fit a crop of 224 in 256"):
        case.run(form)
    assert (case.memory == 0xA5).all()


@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("images", np.zeros((2, 224, 224, 3), np.uint8)),
        ("images", np.zeros((3, 224, 223, 3), np.uint8)),
        ("images", np.zeros((3, 224, 224, 4), np.uint8)),
        ("images", np.zeros((3, 257, 257, 3), np.uint8)),
        ("images", np.zeros((3, 224, 224, 3), np.float32)),
        ("images", np.zeros((3, 224, 224, 3), np.float16)),
        ("images", np.zeros((3, 224, 224, 6), np.uint8)[..., ::2]),
        ("images", np.broadcast_to(np.uint8(0), (3, 224, 224, 3))),
        ("images", np.zeros(3, np.uint8)),
        ("draws", DRAW[:2]),
        ("draws", np.zeros((3, 6), np.int16)),
        ("labels", np.zeros(3, np.int32)),
        ("labels", np.zeros(2, np.int64)),
        ("numbers", np.zeros(4, np.int64)),
        ("at", np.zeros(2, np.int64)),
        ("mean", np.zeros((2, 256, 256, 3), np.float32)),
        ("values", [b"text", "text", b"text"]),
    ],
)
def test_an_array_of_another_size_is_refused(form: str, name: str, wrong: object) -> None:
    """The compiled forms check size, item size, layout and access of every buffer before anything is written."""
    case = Case(DRAW, 224, "uint8")
    setattr(case, name, wrong)
    with pytest.raises((ValueError, TypeError)):
        case.run(form)
    assert (case.memory == 0xA5).all()


def test_a_form_that_is_not_there_is_refused() -> None:
    """The extension itself refuses the name of an unknown form."""
    if kernel.compiled is None:
        pytest.skip("the extension was built without a compiler")
    with pytest.raises(ValueError, match="cannot run the form mmx"):
        Case(DRAW, 224, "uint8").run("mmx")


@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [1, 9, 10, 20, 21, 224, 256])
def test_nothing_is_read_beyond_a_record(form: str, flip: bool, side: int) -> None:
    """A crop at the end of a record does not read beyond it, into memory without access."""
    page, no_access = mmap.PAGESIZE, 0
    pages = -(-(HEADER.size + RAW_BYTES) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place + pages * page), page, no_access) == 0
    end = pages * page
    memory[end - HEADER.size - RAW_BYTES : end] = raw(7)
    case = Case(np.array([(256 - side, 256 - side, flip, (0, 0, 0))], DRAWS), side, "uint8")
    case.values = [memoryview(memory)[end - HEADER.size - RAW_BYTES : end]]
    assert case.run(form) == 1
    window = PIXELS[256 - side :, 256 - side :]
    assert np.array_equal(case.images[0], window[:, ::-1] if flip else window)


def test_a_completed_view_has_eigenvectors_times_eigenvalues(statistics: Statistics) -> None:
    """The basis is eigenvector times eigenvalue in grey levels; the first has a length of about 58."""
    basis = np.array(complete_view(View(), statistics).basis).reshape(3, 3)
    for k in range(3):
        assert np.allclose(basis[:, k], 255 * statistics.eigenvalues[k] * statistics.eigenvectors[:, k])
    assert np.linalg.norm(basis[:, 0]) == pytest.approx(58.16, abs=0.1)


def test_completing_a_view_keeps_a_basis_that_was_given(statistics: Statistics) -> None:
    """A view with a given basis, and views without jitter, are returned unchanged."""
    own = View(basis=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert complete_view(own, statistics) is own
    without = msgspec.structs.replace(View(), jitter=0.0)
    assert complete_view(without, statistics) is without
    assert complete_view(VIEWS["center"], statistics) is VIEWS["center"]
