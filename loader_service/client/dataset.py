"""The facts of a dataset, as a node reports them, in arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loader_service.data.manifest import Statistics
from loader_service.types import DatasetFacts


@dataclass(frozen=True)
class Dataset:
    """The facts of one split.

    Fields:
        count: number of records.
        class_names: names of the classes, by label.
        mean: (side, side, 3) float32, the training split's mean image, 0..255.
        channel_means: (3,) float64, 0..255.
        eigenvalues: (3,) float64, of the covariance of RGB in 0..1, the largest first.
        eigenvectors: (3, 3) float64, column k belongs to eigenvalue k.
        fingerprint: identity of records and statistics.
    """

    count: int
    class_names: tuple[str, ...]
    mean: npt.NDArray[np.float32]
    channel_means: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]
    fingerprint: str

    @classmethod
    def of(cls, facts: DatasetFacts) -> Dataset:
        """Return the facts of a node's Welcome as arrays."""
        return cls(
            count=facts.count,
            class_names=facts.class_names,
            # A view of bytes, so NumPy makes it read-only.
            mean=np.frombuffer(facts.mean_image, "<f4").reshape(facts.side, facts.side, 3),
            channel_means=np.array(facts.channel_means),
            eigenvalues=np.array(facts.eigenvalues),
            eigenvectors=np.array(facts.eigenvectors).reshape(3, 3),
            fingerprint=facts.fingerprint,
        )

    @property
    def side(self) -> int:
        """The records' width and height, in pixels."""
        return len(self.mean)

    @property
    def statistics(self) -> Statistics:
        """The statistics that complete a view."""
        return Statistics(
            mean_image=self.mean,
            channel_means=self.channel_means,
            covariance=np.full((3, 3), np.nan),  # not in a Welcome, and a view needs only its eigenvectors
            eigenvalues=self.eigenvalues,
            eigenvectors=self.eigenvectors,
        )
