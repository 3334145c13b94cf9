"""Mean image, covariance and eigenvectors are exact, and agree with NumPy's float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from loader_service.data.codecs import SHAPE
from loader_service.data.manifest import Statistics
from loader_service.datasets.statistics import Sums, eigen


def pictures(count: int) -> npt.NDArray[np.uint8]:
    """Return (count, 256, 256, 3) uint8 of coloured noise."""
    rng = np.random.Generator(np.random.Philox(key=7))
    base = rng.integers(0, 200, (count, *SHAPE[:2], 1))
    return np.clip(base + rng.integers(-20, 56, (count, *SHAPE)), 0, 255).astype(np.uint8)


def sums_of(batch: npt.NDArray[np.uint8]) -> Sums:
    """Return the sums of images, added one by one."""
    sums = Sums()
    for picture in batch:
        sums.add_picture(picture)
    return sums


def test_they_agree_with_numpy() -> None:
    """Every statistic agrees with NumPy's float64 result from the same pixels."""
    batch = pictures(9)
    found = sums_of(batch).statistics()
    flat = batch.reshape(-1, 3).astype(np.float64)
    np.testing.assert_array_equal(found.mean_image, batch.mean(axis=0).astype(np.float32))
    np.testing.assert_allclose(found.channel_means, flat.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(flat / 255, rowvar=False, bias=True), rtol=1e-10)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(found.covariance)[::-1], rtol=1e-9)
    np.testing.assert_allclose(
        found.eigenvectors * found.eigenvalues @ found.eigenvectors.T, found.covariance, rtol=1e-12, atol=1e-15
    )


def bytes_of(statistics: Statistics) -> list[bytes]:
    """Return all fields as bytes, for comparison without tolerance."""
    fields = ("mean_image", "channel_means", "covariance", "eigenvalues", "eigenvectors")
    return [getattr(statistics, field).tobytes() for field in fields]


@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_they_do_not_depend_on_how_the_work_was_split(order: list[int], cut: int) -> None:
    """The statistics have the same bits for any order and any split into parts."""
    batch = pictures(6)
    whole = Sums()
    for part in (order[:cut], order[cut:]):
        sums = sums_of(batch[part])
        whole.add(sums.count, sums.image, sums.products)
    assert bytes_of(whole.statistics()) == bytes_of(sums_of(batch).statistics())


def test_grey_pictures_have_one_direction() -> None:
    """Grey images vary along (1, 1, 1) only."""
    grey = pictures(2)[..., :1].repeat(3, axis=-1)
    found = sums_of(grey).statistics()
    np.testing.assert_allclose(found.eigenvalues[1:], 0, atol=1e-15)
    np.testing.assert_allclose(found.eigenvectors[:, 0], 1 / np.sqrt(3), rtol=1e-12)


numbers = st.floats(-1, 1, allow_subnormal=False)


@given(st.lists(numbers, min_size=9, max_size=9))
def test_eigen_solves_any_covariance(entries: list[float]) -> None:
    """For any positive semidefinite matrix, values are sorted, vectors orthonormal with fixed signs, and their product is the matrix."""
    factor = np.array(entries).reshape(3, 3)
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2
    values, vectors = (np.array(part) for part in eigen(matrix.tolist()))
    assert (np.diff(values) <= 0).all()
    assert (values >= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-13)
    assert (vectors[np.abs(vectors).argmax(axis=0), range(3)] > 0).all()
