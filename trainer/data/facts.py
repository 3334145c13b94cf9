"""What the trainer must know of a dataset; a checkpoint carries it, so a network can be used without the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """A split, as its node describes it.

    Fields:
        count: records in the split.
        class_names: in the order of the labels.
        fingerprint: of the split's logical records.
        mean: (side, side, 3) float32, the training split's mean image, R, G, B in 0 to 255; as wide as the records.
        crop: the side of what the network sees of a record, in pixels.
    """

    count: int
    class_names: tuple[str, ...]
    fingerprint: str
    mean: Tensor
    crop: int
