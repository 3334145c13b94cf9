"""The manifest, which describes an environment and holds its statistics, and the fingerprint made from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from loader_service.data.codecs import Codec
from loader_service.types import MAX_SIDE_PX, MIN_SIDE_PX, mean_bytes

FORMAT: Final = 1
"""Version of the on-disk format that this code reads and writes."""

MAX_CLASSES: Final = 2**20
"""Bound on what a file may make this process allocate."""

Floats = Annotated[tuple[float, ...], msgspec.Meta(max_length=9)]  # at most a 3 x 3 matrix


@dataclass(frozen=True)
class Statistics:
    """The colour statistics of the training split, computed from exact integer sums.

    Fields:
        mean_image: (side, side, 3) float32, the mean of each pixel, 0..255; side is the records' side.
        channel_means: (3,) float64, 0..255.
        covariance: (3, 3) float64, of RGB values in 0..1 over all pixels.
        eigenvalues: (3,) float64, of the covariance, the largest first.
        eigenvectors: (3, 3) float64; column k belongs to eigenvalue k; its component of largest magnitude is positive.
    """

    mean_image: npt.NDArray[np.float32]
    channel_means: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]

    @property
    def side(self) -> int:
        """Width and height of the records, in pixels."""
        return len(self.mean_image)


class Rejected(msgspec.Struct, frozen=True):
    """A source that became no record, with the reason."""

    source: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The description of an environment, stored in it as MessagePack.

    ``fingerprint`` covers the logical records and the statistics, not the file's bytes. ``golden`` is the hash of sixteen
    fixed samples (see ``golden``). ``size`` is the records' side in pixels.
    """

    format: int
    count: Annotated[int, msgspec.Meta(ge=1, le=2**48)]  # order._mix relies on the bound
    size: int
    codec: Codec
    codec_parameters: dict[str, int | str]
    class_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_CLASSES)]
    class_counts: tuple[int, ...]
    mean_image: bytes
    channel_means: Floats
    covariance: Floats
    eigenvalues: Floats
    eigenvectors: Floats
    made_by: dict[str, str]
    rejected: tuple[Rejected, ...]
    fingerprint: str
    golden: str

    @property
    def statistics(self) -> Statistics:
        """The statistics as arrays."""
        return Statistics(
            mean_image=np.frombuffer(self.mean_image, "<f4").reshape(self.size, self.size, 3),  # a read-only view
            channel_means=np.array(self.channel_means),
            covariance=np.array(self.covariance).reshape(3, 3),
            eigenvalues=np.array(self.eigenvalues),
            eigenvectors=np.array(self.eigenvectors).reshape(3, 3),
        )

    def flaw(self) -> str:
        """Return what is wrong with this manifest beyond its types, as part of a sentence; "" if nothing is."""
        # The manifest comes from a file: check every length before statistics reshapes the bytes.
        if self.format != FORMAT:
            return f"it is of format {self.format}, and this version reads format {FORMAT}: preprocess the images again"
        if not MIN_SIDE_PX <= self.size <= MAX_SIDE_PX:
            return f"its records are {self.size} pixels wide, and this version reads {MIN_SIDE_PX} to {MAX_SIDE_PX}"
        if len(self.mean_image) != mean_bytes(self.size):
            return f"its mean image has {len(self.mean_image)} bytes, records of {self.size} pixels need {mean_bytes(self.size)}"
        lengths = [len(v) for v in (self.channel_means, self.covariance, self.eigenvalues, self.eigenvectors)]
        if lengths != [3, 9, 3, 9] or len(self.class_counts) != len(self.class_names):
            return "its manifest is incomplete"
        if sum(self.class_counts) != self.count:
            return f"its classes have {sum(self.class_counts)} records together, its count says {self.count}"
        return ""


def fingerprint(manifest: Manifest, headers_digest: bytes) -> str:
    """Return the identity of a dataset, 32 hexadecimal digits: equal fingerprints mean equal samples.

    Args:
        manifest: the dataset's manifest; its own fingerprint and golden hash do not count.
        headers_digest: result of :func:`digest_headers`; a header has its payload's checksum, so this covers the pixels.
    """
    # Not covered: codec_parameters, made_by and rejected, which describe the making, and class_counts, which follows
    # from the labels in the headers.
    digest = xxhash.xxh3_128(b"loader-service dataset 1\n")  # versions the fingerprint itself
    digest.update(
        msgspec.msgpack.encode((manifest.format, manifest.count, manifest.size, manifest.codec, manifest.class_names))
    )
    digest.update(manifest.mean_image)  # its length follows from `size`, so the next part starts at a fixed place
    numbers = (manifest.channel_means, manifest.covariance, manifest.eigenvalues, manifest.eigenvectors)
    digest.update(msgspec.msgpack.encode(numbers))
    digest.update(headers_digest)
    return digest.hexdigest()


def digest_headers(headers: Iterator[bytes] | Sequence[bytes]) -> bytes:
    """Return the digest of all record headers, in the order of the records, for :func:`fingerprint`."""
    digest = xxhash.xxh3_128()
    for header in headers:
        digest.update(header)
    return digest.digest()
