"""The colour statistics of a dataset, from exact integer sums: the same on any machine, however the work is split.

The mean image is the paper's (section 2: "subtracting the mean activity over the training set from each pixel"); the
eigenvectors and eigenvalues of the RGB covariance are those of its colour jitter (section 4.1), of values in 0..1.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service.data import kernel
from loader_service.data.manifest import Statistics
from loader_service.types import RECORD_SIDE_PX

GREY_LEVELS: Final = 255

Matrix = list[list[float]]


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """Sums on disk: the pixels' as (side, side, 3) little-endian uint64, and the nine sums of products, row by row."""

    count: int
    image: bytes
    products: list[int]


class Sums:
    """The exact sums behind the statistics; the sums of parts add up to the sums of the whole.

    Args:
        side: side of the images, in pixels.
    """

    def __init__(self, side: int = RECORD_SIDE_PX) -> None:
        self.count = 0
        self.image = np.zeros((side, side, 3), np.uint64)  # enough for 2**56 images
        self.products = np.zeros((3, 3), np.int64)  # enough for 2**31 images of 256 x 256 pixels

    def add(self, count: int, image: npt.NDArray[np.unsignedinteger], products: npt.NDArray[np.int64]) -> None:
        """Add a part.

        Args:
            count: number of images.
            image: (side, side, 3), sum of their pixels.
            products: (3, 3) int64, sum over all pixels of the product of each two channels.
        """
        self.count += count
        self.image += image
        self.products += products

    def add_picture(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Add one image, (side, side, 3) uint8."""
        image, products = np.zeros(pixels.shape, np.uint16), np.zeros((3, 3), np.int64)  # the kernel's dtypes
        kernel.add(pixels, image, products)
        self.add(1, image, products)

    def to_bytes(self) -> bytes:
        """Return these sums as bytes, for :meth:`from_bytes`."""
        return msgspec.msgpack.encode(
            _Stored(self.count, self.image.astype("<u8").tobytes(), self.products.ravel().tolist())
        )

    @classmethod
    def from_bytes(cls, data: bytes, side: int = RECORD_SIDE_PX) -> Sums:
        """Return the sums that :meth:`to_bytes` stored, of images of ``side`` pixels.

        Raises:
            ValueError: the bytes are not such sums.
        """
        stored = msgspec.msgpack.decode(data, type=_Stored)  # msgspec's errors are ValueErrors
        sums = cls(side)
        sums.count = stored.count
        sums.image = np.frombuffer(stored.image, "<u8").reshape(sums.image.shape).astype(np.uint64)
        sums.products = np.array(stored.products, np.int64).reshape(3, 3)
        return sums

    def statistics(self) -> Statistics:
        """Return the statistics of all images added so far; there must be at least one."""
        n = self.count * self.image.shape[0] * self.image.shape[1]  # pixels per channel
        sums = [int(s) for s in self.image.sum(axis=(0, 1))]  # (3,), Python integers: the products below exceed 64 bits
        # Exact fractions, rounded once at the end: every machine gets the same float.
        covariance = [
            [
                float(Fraction(int(self.products[i, j]) * n - sums[i] * sums[j], (n * GREY_LEVELS) ** 2))
                for j in range(3)
            ]
            for i in range(3)
        ]
        values, vectors = eigen(covariance)
        return Statistics(
            # Sums below 2**53 are exact in float64, so a correctly rounded quotient is the same everywhere.
            mean_image=(self.image / self.count).astype(np.float32),
            channel_means=np.array([s / n for s in sums]),
            covariance=np.array(covariance),
            eigenvalues=np.array(values),
            eigenvectors=np.array(vectors),
        )


def eigen(matrix: Matrix) -> tuple[list[float], Matrix]:
    """Return eigenvalues, largest first, and eigenvectors of a symmetric positive semidefinite 3 x 3 matrix.

    Column k of the vectors belongs to value k, and its component of largest magnitude is positive. This is Jacobi's method
    in plain Python: IEEE additions, products, quotients and square roots give the same bits everywhere; LAPACK does not.
    """
    a = [row[:] for row in matrix]
    v = [[float(i == j) for j in range(3)] for i in range(3)]
    for _ in range(30):  # converges quadratically: six sweeps in practice
        if all(a[p][q] == 0.0 for p, q in ((0, 1), (0, 2), (1, 2))):
            break
        for p, q in ((0, 1), (0, 2), (1, 2)):
            _rotate(a, v, p, q)
    order = sorted(range(3), key=lambda k: -a[k][k])
    columns = [_signed([v[i][k] for i in range(3)]) for k in order]
    # Rounding may leave a zero eigenvalue slightly negative.
    return [max(0.0, a[k][k]) for k in order], [list(row) for row in zip(*columns, strict=True)]


def _rotate(a: Matrix, v: Matrix, p: int, q: int) -> None:
    """Apply one Jacobi rotation in place: make a[p][q] zero and rotate the vectors with it."""
    if a[p][q] == 0.0:
        return
    if abs(a[p][q]) < 1e-20 * math.sqrt(abs(a[p][p] * a[q][q])):
        a[p][q] = a[q][p] = 0.0  # far below rounding
        return
    # t is the smaller root of t**2 + 2 theta t - 1 = 0: a rotation of at most 45 degrees, without cancellation.
    theta = (a[q][q] - a[p][p]) / (2 * a[p][q])
    t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + math.sqrt(theta * theta + 1))
    c = 1 / math.sqrt(t * t + 1)
    s = t * c
    for row in a:
        row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
    a[p], a[q] = (
        [c * x - s * y for x, y in zip(a[p], a[q], strict=True)],
        [s * x + c * y for x, y in zip(a[p], a[q], strict=True)],
    )
    a[p][q] = a[q][p] = 0.0  # rounding leaves a rest; eigen() stops only at exact zeros
    for row in v:
        row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]


def _signed(vector: list[float]) -> list[float]:
    """Return the vector or its negative, so that the component of largest magnitude is positive."""
    return vector if max(vector, key=abs) > 0 else [-x for x in vector]  # both are eigenvectors; this one is unique
