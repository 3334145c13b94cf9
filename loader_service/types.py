"""The value types that every part shares: what a view, a slice and a sample's draws are, and how large they are.

Nothing here does anything: these are frozen values with canonical bytes, so that two machines mean the same by them.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

RECORD_SIDE_PX: Final = 256
"""How wide and high records are unless preprocessing is told otherwise (AlexNet paper, section 2)."""

MIN_SIDE_PX: Final = 8
MAX_SIDE_PX: Final = 1024
"""Bounds of a record's side: its mean image goes with every Welcome, 12 MiB at most."""

CROP_SIDE_PX: Final = 224
"""What the network sees of a record of the usual side (section 4.1)."""

JITTER_SIGMA: Final = 0.1
"""Standard deviation of the colour jitter's alpha (section 4.1)."""

MAX_SLICE: Final = 4096
"""Most positions that one request may ask for; a bound for what arrives from a socket."""

Split = Literal["train", "val"]
Kind = Literal["train", "center", "ten-crop", "whole"]
Order = Literal["shuffled", "sequential"]
Dtype = Literal["uint8", "float16", "float32"]

MAX_EXCLUDED: Final = 1024
"""Most records that a run may exclude as bad: they travel with every request, and a worse dataset wants mending."""

DRAWS: Final = np.dtype(
    [("y", "<i2"), ("x", "<i2"), ("flip", "?"), ("shift", "<i2", (3,))],
    align=True,
)
"""What chance decided for one sample: the crop's first row and column in the record, whether it was mirrored,
and the colour shift of each channel (R, G, B) in grey levels. 12 bytes."""


def mean_bytes(side: int) -> int:
    """Bytes of the mean image of records of ``side`` pixels: (side, side, 3) float32."""
    return side * side * 3 * 4


def default_crop(side: int) -> int:
    """The side of the crops of records of ``side`` pixels where nobody asks for another: 224 of 256, else in proportion."""
    return (CROP_SIDE_PX * side + RECORD_SIDE_PX // 2) // RECORD_SIDE_PX


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which augmentation policy makes a sample. A value: equal views give equal bytes.

    Fields:
        kind: ``train`` (random crop, flip, colour jitter), ``center`` (the centre crop), ``ten-crop`` (four corners
            and the centre, then their mirror images), ``whole`` (the record as it is).
        crop: side of the crop, in pixels; 224 in the paper. 0 means 7/8 of the records' side, and ``whole`` always has
            that side, which a client fills in before the view leaves it.
        flip: whether half of the samples are mirrored (``train`` only).
        jitter: standard deviation of alpha in the colour jitter; 0 switches it off (``train`` only).
        basis: nine numbers, row by row: ``basis[c][k]`` is what one unit of alpha_k adds to channel c, in grey levels.
            Empty means the dataset's own (eigenvector times eigenvalue, paper section 4.1), which a client fills in
            before the view leaves it.
        order: ``shuffled`` anew for each epoch, or ``sequential``, the records' own order.
    """

    kind: Kind = "train"
    crop: int = CROP_SIDE_PX
    flip: bool = True
    jitter: float = JITTER_SIGMA
    basis: tuple[float, ...] = ()
    order: Order = "shuffled"

    def __post_init__(self) -> None:
        if not 0 <= self.crop <= MAX_SIDE_PX:
            raise ValueError(f"a view's crop is 0 to {MAX_SIDE_PX} pixels, not {self.crop}")
        if not (math.isfinite(self.jitter) and 0 <= self.jitter <= 100):
            raise ValueError(f"a view's jitter is a standard deviation from 0 to 100, not {self.jitter}")
        if len(self.basis) not in (0, 9) or not all(math.isfinite(b) and abs(b) <= 1e4 for b in self.basis):
            raise ValueError("a view's jitter basis is nine finite numbers of at most 10,000 grey levels, or empty")
        if self.kind != "train" and (self.flip or self.jitter or self.basis):
            raise ValueError(f"a view of kind {self.kind} has no flip and no jitter")

    @classmethod
    def named(cls, name: str, side: int = RECORD_SIDE_PX) -> View:
        """The view that a name stands for, ``train``, ``center``, ``ten-crop`` or ``whole``, of records of ``side`` pixels."""
        try:
            view = VIEWS[name]
        except KeyError:
            raise ValueError(f"there is no view named {name!r}; there are {', '.join(VIEWS)}") from None
        return msgspec.structs.replace(view, crop=0).of_records(side)

    def of_records(self, side: int) -> View:
        """This view of records of ``side`` pixels, its crop filled in.

        Raises:
            ValueError: the crop is larger than they are.
        """
        crop = side if self.kind == "whole" else self.crop or default_crop(side)
        if crop > side:
            raise ValueError(f"a crop of {crop} pixels does not fit into records of {side}")
        return self if crop == self.crop else msgspec.structs.replace(self, crop=crop)

    @property
    def samples_per_record(self) -> int:
        """How many pictures this view makes of one record: 10 for ``ten-crop``, else 1."""
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
        """The bytes that stand for this view in identities and saved states."""
        return msgspec.msgpack.encode(self)


VIEWS: Final[dict[str, View]] = {
    "train": View(),
    "center": View(kind="center", flip=False, jitter=0.0, order="sequential"),
    "ten-crop": View(kind="ten-crop", flip=False, jitter=0.0, order="sequential"),
    "whole": View(kind="whole", crop=RECORD_SIDE_PX, flip=False, jitter=0.0, order="sequential"),
}


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class SliceId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples: with the dataset, everything that decides a slice's bytes.

    ``start`` and ``count`` are positions in the order of ``epoch`` under ``seed``. ``excluded`` are the records, ascending,
    whose pixels are replaced by others' because they are bad.
    """

    view: View
    seed: Count
    epoch: Count
    start: Position
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLICE)]
    excluded: Annotated[tuple[Position, ...], msgspec.Meta(max_length=MAX_EXCLUDED)] = ()


class SampleLayout(msgspec.Struct, frozen=True):
    """How many bytes one sample takes in a slot, for one view and dtype."""

    view: View
    dtype: Dtype

    @property
    def image_bytes(self) -> int:
        """Bytes of one sample's pixels."""
        return math.prod(self.view.shape) * np.dtype(self.dtype).itemsize

    @property
    def draws_bytes(self) -> int:
        """Bytes of one sample's draws."""
        return self.view.samples_per_record * DRAWS.itemsize

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample altogether: pixels, an int64 label, draws."""
        return self.image_bytes + 8 + self.draws_bytes


Images = npt.NDArray[np.uint8] | npt.NDArray[np.float16] | npt.NDArray[np.float32]


class Slice(msgspec.Struct):
    """The arrays that a slice of n samples is written into, wherever they lie.

    Fields:
        images: (n, *view.shape) uint8, or float16 or float32 with the mean's window subtracted.
        labels: (n,) int64.
        draws: (n, *view.draws_shape) DRAWS.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    draws: npt.NDArray[np.void]


class StageSeconds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that went into each stage of making slices; the same stages as ``STAGES``.

    Fields:
        read: looking records up, which touches their pages, so that a disk's time is in here.
        decode: making pixels of jpeg records; nothing for raw ones.
        augment: cropping, mirroring, shifting colours, subtracting the mean, and writing the result.
    """

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.read + other.read, self.decode + other.decode, self.augment + other.augment)

    def __sub__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.read - other.read, self.decode - other.decode, self.augment - other.augment)


STAGES: Final = StageSeconds.__struct_fields__
"""What a worker does for a slice, in order; a stage's number is its index."""


BUILTIN_GOLDEN: Final = "84ac929c26f8f74d7da07693135ce249"
"""The hash of the built-in pictures' samples, as every node of this version must make them: see ``data/golden.py``. It
changes only with what samples are, and whoever changes that makes a version whose runs cannot go on from another's."""

GoldenHash = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class Installation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node is made of, as far as bytes of samples depend on it.

    Fields:
        golden: hash of the built-in pictures' samples, as this node makes them.
        libraries: versions of what makes them, by name; to be told when the hash is another.
    """

    golden: GoldenHash
    libraries: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=64)]],
        msgspec.Meta(max_length=16),
    ]

    def __str__(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.libraries.items())


class DatasetFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node tells of one split it serves; with a slice's identity, all that decides the bytes.

    Fields:
        count: number of records.
        class_names: by label.
        mean_image: (side, side, 3) little-endian float32, 0..255, as bytes; its length tells the records' side.
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
        """How wide and high the records are, in pixels."""
        return math.isqrt(len(self.mean_image) // 12)


class EpochAccount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The account of one epoch, in positions; one rank's, or the sum over the ranks of a run.

    An epoch is complete when ``delivered == expected``: each sample exactly once.

    Fields:
        epoch: which.
        expected: positions to deliver, from where the loader (or the state it resumed from) began.
        delivered: positions returned to the caller so far, each once.
        duplicates_refused: answers for a slice that had been given up or was already there.
        reassigned: slices asked for again, because their node was lost or could not make them.
        substituted: positions whose record was bad and whose pixels are another's.
    """

    epoch: int
    expected: int
    delivered: int = 0
    duplicates_refused: int = 0
    reassigned: int = 0
    substituted: int = 0

    def continued(self, rest: EpochAccount) -> EpochAccount:
        """Return the account of an epoch that was left in its middle and continued by another loader.

        ``expected`` stays this account's, which counts the whole epoch; ``rest`` expected what was left of it.
        """
        return EpochAccount(
            epoch=self.epoch,
            expected=self.expected,
            delivered=self.delivered + rest.delivered,
            duplicates_refused=self.duplicates_refused + rest.duplicates_refused,
            reassigned=self.reassigned + rest.reassigned,
            substituted=self.substituted + rest.substituted,
        )
