"""Value types that every part shares: views, slices, draws, dataset facts, and their sizes.

All but ``Slice``, which holds arrays, are frozen values with canonical bytes, so that two machines mean the same thing by them. Section numbers
refer to the AlexNet paper (Krizhevsky, Sutskever and Hinton, 2012).
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

RECORD_SIDE_PX: Final = 256
"""Default width and height of a record, in pixels (section 2)."""

MIN_SIDE_PX: Final = 8
MAX_SIDE_PX: Final = 1024
"""Bounds of a record's side, in pixels. Every Welcome carries the mean image, so the upper bound limits it to 12 MiB."""

CROP_SIDE_PX: Final = 224
"""Default side of a crop from a record of RECORD_SIDE_PX, in pixels (section 4.1)."""

JITTER_SIGMA: Final = 0.1
"""Standard deviation of the colour jitter's alpha (section 4.1)."""

MAX_SLICE: Final = 4096
"""Upper bound of the positions in one request; requests arrive from sockets, so every number in them is bounded."""

Split = Literal["train", "val"]
Kind = Literal["train", "center", "ten-crop", "whole"]
Order = Literal["shuffled", "sequential"]
Dtype = Literal["uint8", "float16", "float32"]

MAX_EXCLUDED: Final = 1024
"""Upper bound of the records that a run may exclude as bad. Every request carries the list, and a dataset with more bad
records needs repair."""

DRAWS: Final = np.dtype(
    # int16 holds every offset (at most MAX_SIDE_PX) and every shift; the byte order is fixed, since the bytes travel.
    [("y", "<i2"), ("x", "<i2"), ("flip", "?"), ("shift", "<i2", (3,))],
    align=True,  # one byte of padding after flip, so that shift is at an even offset
)
"""The random draws of one sample, 12 bytes: the first row and column of the crop in the record (pixels), the flip, and
the colour shift of each channel (R, G, B) in grey levels."""


def mean_bytes(side: int) -> int:
    """Return the bytes of the mean image of records of ``side`` pixels: (side, side, 3) float32."""
    return side * side * 3 * 4  # float32


def default_crop(side: int) -> int:
    """Return the default side of a crop from records of ``side`` pixels: 224 of 256, rounded in the same proportion."""
    # Integers alone, so that no float rounding decides.
    return (CROP_SIDE_PX * side + RECORD_SIDE_PX // 2) // RECORD_SIDE_PX


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An augmentation policy. Equal views give equal bytes.

    Fields:
        kind: ``train`` (random crop, flip, colour jitter), ``center`` (the centre crop), ``ten-crop`` (four corners
            and the centre, then their mirror images), ``whole`` (the record as it is).
        crop: side of the crop, in pixels; 224 in the paper. 0 means 7/8 of the records' side (``whole``: all of it); the
            client replaces 0 by the number before it sends the view.
        flip: mirror half of the samples (``train`` only).
        jitter: standard deviation of alpha in the colour jitter; 0 disables it (``train`` only).
        basis: nine numbers, row by row: one unit of alpha_k adds ``basis[c][k]`` grey levels to channel c. Empty means
            the dataset's own basis (eigenvector times eigenvalue, section 4.1); the client fills it in before it sends
            the view.
        order: ``shuffled`` anew for each epoch, or ``sequential``, the records' own order.
    """

    kind: Kind = "train"
    crop: int = CROP_SIDE_PX
    flip: bool = True
    jitter: float = JITTER_SIGMA
    basis: tuple[float, ...] = ()
    order: Order = "shuffled"

    # msgspec calls this for views that arrive in messages and saved states, too.
    def __post_init__(self) -> None:
        if not 0 <= self.crop <= MAX_SIDE_PX:
            raise ValueError(f"a view's crop is 0 to {MAX_SIDE_PX} pixels, not {self.crop}")
        if not (math.isfinite(self.jitter) and 0 <= self.jitter <= 100):  # MessagePack can carry NaN and infinity
            raise ValueError(f"a view's jitter is a standard deviation from 0 to 100, not {self.jitter}")
        if len(self.basis) not in (0, 9) or not all(math.isfinite(b) and abs(b) <= 1e4 for b in self.basis):
            raise ValueError("a view's jitter basis is nine finite numbers of at most 10,000 grey levels, or empty")
        if self.kind != "train" and (self.flip or self.jitter or self.basis):
            raise ValueError(f"a view of kind {self.kind} has no flip and no jitter")

    @classmethod
    def named(cls, name: str, side: int = RECORD_SIDE_PX) -> View:
        """Return the view with a name of ``VIEWS``, for records of ``side`` pixels.

        Raises:
            ValueError: no view has this name.
        """
        try:
            view = VIEWS[name]
        except KeyError:
            raise ValueError(f"there is no view named {name!r}; there are {', '.join(VIEWS)}") from None
        return msgspec.structs.replace(view, crop=0).of_records(side)  # 0: of_records scales the crop to the side

    def of_records(self, side: int) -> View:
        """Return this view for records of ``side`` pixels, with its crop filled in.

        Raises:
            ValueError: the crop is larger than the records.
        """
        crop = side if self.kind == "whole" else self.crop or default_crop(side)  # 0 counts as not given
        if crop > side:
            raise ValueError(f"a crop of {crop} pixels does not fit into records of {side}")
        return self if crop == self.crop else msgspec.structs.replace(self, crop=crop)

    @property
    def crops_per_record(self) -> int:
        """Crops that this view makes of one record, all in one sample: 10 for ``ten-crop``, else 1."""
        return 10 if self.kind == "ten-crop" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's pixels: (crop, crop, 3) or, for ``ten-crop``, (10, crop, crop, 3)."""
        side = (self.crop, self.crop, 3)
        return (10, *side) if self.kind == "ten-crop" else side

    @property
    def draws_shape(self) -> tuple[int, ...]:
        """Shape of one sample's draws: () or, for ``ten-crop``, (10,)."""
        return (10,) if self.kind == "ten-crop" else ()

    def canonical(self) -> bytes:
        """Return the bytes that stand for this view in identities and saved states."""
        return msgspec.msgpack.encode(self)  # fields in the order of the class, so equal views give equal bytes


VIEWS: Final[dict[str, View]] = {
    "train": View(),
    "center": View(kind="center", flip=False, jitter=0.0, order="sequential"),
    "ten-crop": View(kind="ten-crop", flip=False, jitter=0.0, order="sequential"),
    "whole": View(kind="whole", crop=RECORD_SIDE_PX, flip=False, jitter=0.0, order="sequential"),
}


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# Bounded so that 4 * position, the counter of the random words, fits a uint64 (see data/draws.py).
Position = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class SliceId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a slice; together with the dataset it determines every byte of the slice.

    Fields:
        view: the augmentation policy.
        seed, epoch: the key of the random words, and so of the epoch's order.
        start, count: the first position in that order, and the number of consecutive positions.
        excluded: the bad records, in ascending order; pixels of other records replace theirs.
    """

    view: View
    seed: Count
    epoch: Count
    start: Position
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLICE)]
    excluded: Annotated[tuple[Position, ...], msgspec.Meta(max_length=MAX_EXCLUDED)] = ()


class SampleLayout(msgspec.Struct, frozen=True):
    """The bytes that one sample takes in a slot, for one view and dtype."""

    view: View
    dtype: Dtype

    @property
    def image_bytes(self) -> int:
        """Bytes of one sample's pixels."""
        return math.prod(self.view.shape) * np.dtype(self.dtype).itemsize

    @property
    def draws_bytes(self) -> int:
        """Bytes of one sample's draws."""
        return self.view.crops_per_record * DRAWS.itemsize

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample: pixels, an int64 label, draws."""
        return self.image_bytes + 8 + self.draws_bytes  # 8: the int64 label


Images = npt.NDArray[np.uint8] | npt.NDArray[np.float16] | npt.NDArray[np.float32]


class Slice(msgspec.Struct):
    """The arrays that a slice of n samples is written into, in any memory.

    Fields:
        images: (n, *view.shape) uint8, or float16 or float32 with the mean's window subtracted.
        labels: (n,) int64.
        draws: (n, *view.draws_shape) DRAWS.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    draws: npt.NDArray[np.void]


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds spent in each stage of writing slices; the fields are the stages (``STAGES``).

    Fields:
        read: look up records and touch their pages, so that this stage includes the disk's time.
        decode: decode jpeg records; 0 for raw ones.
        augment: crop, mirror, shift colours, subtract the mean, and write the result.
    """

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.read + other.read, self.decode + other.decode, self.augment + other.augment)

    def __sub__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.read - other.read, self.decode - other.decode, self.augment - other.augment)


STAGES: Final = StageSeconds.__struct_fields__
"""The stages of a slice, in order. Workers publish a stage as its index in this tuple."""


BUILTIN_GOLDEN: Final = "84ac929c26f8f74d7da07693135ce249"
"""The hash of the samples of the built-in images, which every node of this version must reproduce: see
``data/golden.py``. A change to the bytes of samples changes it, and then saved states of earlier versions no longer load."""

GoldenHash = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class Installation(msgspec.Struct, frozen=True):
    """The software of a node, as far as bytes of samples depend on it.

    Fields:
        golden: hash of the samples of the built-in images, as this node makes them.
        libraries: version by library name; an error about a different hash lists them.
    """

    golden: GoldenHash
    libraries: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=64)]],
        msgspec.Meta(max_length=16),
    ]

    def __str__(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.libraries.items())


class DatasetFacts(msgspec.Struct, frozen=True):
    """The facts of one split that a node serves. Together with a slice's identity they determine its bytes.

    Fields:
        count: number of records.
        class_names: class names, by label.
        mean_image: (side, side, 3) little-endian float32, 0..255, as bytes; the length gives the records' side.
        channel_means: three means, 0..255.
        eigenvalues: three, of the covariance of RGB in 0..1, the largest first.
        eigenvectors: nine numbers, (3, 3) row by row; column k belongs to eigenvalue k.
        fingerprint: identity of the records and statistics.
        golden: hash of sixteen fixed samples, as this node makes them.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    class_names: tuple[str, ...]
    mean_image: Annotated[bytes, msgspec.Meta(min_length=mean_bytes(MIN_SIDE_PX), max_length=mean_bytes(MAX_SIDE_PX))]
    channel_means: Annotated[tuple[float, ...], msgspec.Meta(min_length=3, max_length=3)]
    eigenvalues: Annotated[tuple[float, ...], msgspec.Meta(min_length=3, max_length=3)]
    eigenvectors: Annotated[tuple[float, ...], msgspec.Meta(min_length=9, max_length=9)]
    fingerprint: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
    golden: GoldenHash

    def __post_init__(self) -> None:
        if mean_bytes(self.side) != len(self.mean_image):
            raise ValueError(f"a mean image of {len(self.mean_image)} bytes is not a square one of float32 RGB")

    @property
    def side(self) -> int:
        """Width and height of the records, in pixels."""
        return math.isqrt(len(self.mean_image) // 12)  # 3 channels of 4 bytes


class EpochAccount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The account of one epoch, in positions; one rank's, or the sum over the ranks of a run.

    An epoch is complete when ``delivered == expected``: each sample exactly once. The next epoch begins when
    ``delivered + left_out == expected``.

    Fields:
        epoch: number of the epoch, from 0.
        expected: positions to deliver, counted from the position at which the loader started or resumed.
        delivered: positions returned to the caller so far, each once.
        duplicates_refused: answers for a slice that the client had given up or received before.
        reassigned: slices requested again, because their node was lost or could not make them.
        substituted: positions with a bad record, filled with the pixels of another record.
        left_out: positions that the caller left out, because he ended a loop before the epoch's end and began another one.
    """

    epoch: int
    expected: int
    delivered: int = 0
    duplicates_refused: int = 0
    reassigned: int = 0
    substituted: int = 0
    left_out: int = 0

    def continued(self, rest: EpochAccount) -> EpochAccount:
        """Return the account of an epoch that one loader started and another finished.

        ``expected`` stays this account's, which counts the whole epoch; ``rest`` counts only the remaining part.
        """
        return EpochAccount(
            epoch=self.epoch,
            expected=self.expected,  # rest.expected counts from the place where it resumed
            delivered=self.delivered + rest.delivered,
            duplicates_refused=self.duplicates_refused + rest.duplicates_refused,
            reassigned=self.reassigned + rest.reassigned,
            substituted=self.substituted + rest.substituted,
            left_out=self.left_out + rest.left_out,
        )
