"""One sample's pixels, against the definition written out pixel by pixel."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_service.data.augment import augment, centre, complete_view
from loader_service.data.records import SHAPE, Statistics
from loader_service.spec import DRAWS, VIEWS, View

PIXELS = np.random.Generator(np.random.Philox(1)).integers(0, 256, SHAPE, np.uint8)

shifts = st.integers(-255, 255) | st.sampled_from([0, -255, 255])


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, npt.NDArray[np.void]]:
    """A crop's side and a DRAWS that fits it."""
    side = draw(st.integers(1, 256) | st.just(224))
    places = st.integers(0, 256 - side)
    values = (draw(places), draw(places), draw(st.booleans()), (draw(shifts), draw(shifts), draw(shifts)))
    return side, np.array(values, DRAWS)[()]


def defined(side: int, drawn: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """The definition: crop, mirror, add, and clip to 0..255."""
    y, x = int(drawn["y"]), int(drawn["x"])
    window = PIXELS[y : y + side, x : x + side].astype(np.int64)
    return np.clip((window[:, ::-1] if drawn["flip"] else window) + drawn["shift"], 0, 255)


@given(cases())
def test_a_sample_is_crop_flip_and_saturated_shift(case: tuple[int, npt.NDArray[np.void]]) -> None:
    """Any crop, flip and shift gives what the definition gives."""
    side, drawn = case
    out = np.full((side, side, 3), 77, np.uint8)
    augment(out, PIXELS, drawn)
    assert np.array_equal(out, defined(side, drawn))


@given(cases())
def test_centring_subtracts_the_window_that_was_cut(case: tuple[int, npt.NDArray[np.void]]) -> None:
    """float32 is the uint8 sample minus the mean's window at the same place, mirrored with it."""
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


def test_a_completed_view_has_eigenvectors_times_eigenvalues(statistics: Statistics) -> None:
    """The basis is what one unit of alpha adds, in grey levels: about 58 times the first eigenvector."""
    basis = np.array(complete_view(View(), statistics).basis).reshape(3, 3)
    for k in range(3):
        assert np.allclose(basis[:, k], 255 * statistics.eigenvalues[k] * statistics.eigenvectors[:, k])
    assert np.linalg.norm(basis[:, 0]) == pytest.approx(58.16, abs=0.1)


def test_completing_a_view_keeps_a_basis_that_was_given(statistics: Statistics) -> None:
    """A basis of one's own, and views without jitter, stay as they are."""
    own = View(basis=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert complete_view(own, statistics) is own
    without = msgspec.structs.replace(View(), jitter=0.0)
    assert complete_view(without, statistics) is without
    assert complete_view(VIEWS["center"], statistics) is VIEWS["center"]
