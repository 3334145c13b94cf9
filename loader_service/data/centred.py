"""The codec ``centered``: mean subtraction as stored pixels, without losing any of them.

A payload is (side, side, 3) little-endian int16 in C order: pixel minus the training split's mean image, in units of
1 / 2**FRACTION_BITS grey levels. The mean is rounded to that unit first, so that adding it again gives the pixel exactly;
it is within 1/256 of a grey level of the manifest's. The largest difference, 255 * 128, fits into 16 bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

FRACTION_BITS: Final = 7


def centre_of(mean_image: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """What is subtracted, in the payload's units.

    Args:
        mean_image: (side, side, 3) float32, 0..255.

    Returns:
        (side, side, 3) int16, 0 .. 255 * 2**FRACTION_BITS; scaling by a power of two is exact, so it is the same anywhere.
    """
    return np.rint(np.ldexp(np.clip(mean_image, 0, 255), FRACTION_BITS)).astype(np.int16)


def encode_centred(pixels: npt.NDArray[np.uint8], centre: npt.NDArray[np.int16]) -> bytes:
    """The payload of a record.

    Args:
        pixels: (side, side, 3) uint8, RGB.
        centre: of :func:`centre_of`.
    """
    scaled = np.left_shift(pixels.astype(np.int16), FRACTION_BITS)
    return np.subtract(scaled, centre).astype("<i2", copy=False).tobytes()


def decode_centred(
    payload: bytes | memoryview, centre: npt.NDArray[np.int16], into: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """The pixels of a payload: (side, side, 3) uint8, RGB.

    Args:
        payload: a record's, as it is stored.
        centre: of :func:`centre_of`, for the mean image that was subtracted.
        into: (centre.size,) uint8, where they are written; a new array if None.

    Raises:
        ValueError: the payload has another length.
    """
    if len(payload) != 2 * centre.size:
        raise ValueError(f"a centered payload has {2 * centre.size} bytes, this one {len(payload)}")
    stored = np.frombuffer(payload, "<i2").reshape(centre.shape)
    out = (np.empty(centre.size, np.uint8) if into is None else into).reshape(centre.shape)
    scaled = np.add(stored, centre)
    np.right_shift(scaled, FRACTION_BITS, out=scaled)
    np.copyto(out, scaled, casting="unsafe")
    return out
