"""The payloads of records: what ``raw`` and ``jpeg`` are.

A stored value is HEADER, then the payload. ``raw`` is (side, side, 3) uint8 RGB in C order, and ``jpeg`` a JPEG of the same
pixels; how wide records are, the manifest says.

``centered`` is mean subtraction as stored pixels, without losing any of them: (side, side, 3) little-endian int16 in C order,
pixel minus the training split's mean image, in units of 1 / 2**FRACTION_BITS grey levels. The mean is rounded to that unit
first, so that adding it again gives the pixel exactly; it is within 1/256 of a grey level of the manifest's. The largest
difference, 255 * 128, fits into 16 bits.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
import xxhash

from loader_service.data import kernel
from loader_service.data.kernel import Window
from loader_service.types import RECORD_SIDE_PX

HEADER: Final = struct.Struct("<IBxxxQ")
"""label, codec number, xxh3-64 of the payload: 16 bytes."""

SHAPE: Final = (RECORD_SIDE_PX, RECORD_SIDE_PX, 3)
"""Of a record of the usual side."""

Codec = Literal["raw", "jpeg", "centered"]
CODECS: Final[dict[Codec, int]] = {"raw": 0, "jpeg": 1, "centered": 2}
FRACTION_BITS: Final = 7

SUBSAMPLINGS: Final = ("420", "422", "444")
"""Of a jpeg's colours: how ``encode`` can store them."""

DEFAULT_PARAMETERS: Final[dict[Codec, dict[str, int | str]]] = {
    "raw": {},
    "jpeg": {"quality": 90, "subsampling": "420"},
    "centered": {"fraction_bits": FRACTION_BITS},
}

Pixels = npt.NDArray[np.uint8]


def raw_bytes(side: int) -> int:
    """Bytes of a ``raw`` payload of ``side`` x ``side`` pixels."""
    return 3 * side * side


RAW_BYTES: Final = raw_bytes(RECORD_SIDE_PX)
"""Of a record of the usual side."""


def header(label: int, codec: Codec, payload: bytes | memoryview) -> bytes:
    """What stands before a payload."""
    return HEADER.pack(label, CODECS[codec], xxhash.xxh3_64_intdigest(payload))


def encode(pixels: Pixels, codec: Literal["raw", "jpeg"], parameters: dict[str, int | str] | None = None) -> bytes:
    """The payload of a record; for ``centered`` see :func:`encode_centred`.

    Args:
        pixels: (side, side, 3) uint8, RGB.
        codec: ``raw`` or ``jpeg``.
        parameters: for jpeg ``quality`` (1..100) and ``subsampling`` ("420", "422", "444"); the default is 90, "420".
    """
    side = pixels.shape[0]
    if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"a record is (side, side, 3) uint8, not {pixels.shape} {pixels.dtype}")
    if codec == "raw":
        return pixels.tobytes()
    chosen = DEFAULT_PARAMETERS["jpeg"] | (parameters or {})
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=int(chosen["quality"]),
            colorspace="RGB",
            colorsubsampling=str(chosen["subsampling"]),
        )
    )


def decode(
    payload: bytes | memoryview,
    codec: int,
    into: npt.NDArray[np.uint8] | None = None,
    *,
    side: int = RECORD_SIDE_PX,
    window: Window | None = None,
) -> Pixels:
    """The pixels of a payload that needs no mean: (side, side, 3) uint8, RGB; of ``raw`` a view, not a copy.

    Args:
        payload: a record's, as it is stored.
        codec: of :data:`CODECS`, ``raw`` or ``jpeg``.
        into: (raw_bytes(side),) uint8, where a ``jpeg`` is decoded to; a new array if None.
        side: of the record, in pixels.
        window: what is needed of a ``jpeg``: other pixels may be anything. None: all of it, which libjpeg-turbo decodes.

    Raises:
        ValueError: the payload is not what the codec says, in the window or elsewhere.
    """
    size, shape = raw_bytes(side), (side, side, 3)
    if codec == CODECS["raw"]:
        if len(payload) != size:
            raise ValueError(f"a raw payload has {size} bytes, this one {len(payload)}")
        return np.frombuffer(payload, np.uint8).reshape(shape)
    if codec == CODECS["jpeg"]:
        # Into a buffer of this size even where none is given: a JPEG that says it is huge is then refused.
        buffer = np.empty(size, np.uint8) if into is None else into
        if window is not None and kernel.decode_window(payload, buffer, (side, side), window):
            return buffer.reshape(shape)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=buffer)
        except ValueError as error:
            raise ValueError(f"its JPEG cannot be decoded ({error})") from error
        if pixels.shape != shape:
            raise ValueError(f"the JPEG decodes to {pixels.shape}, not {shape}")
        return pixels
    raise ValueError(f"codec number {codec} is unknown")


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


def raw_value(side: int = RECORD_SIDE_PX) -> npt.NDArray[np.uint8]:
    """Memory for one raw record, header and payload: (16 + raw_bytes(side),) uint8.

    Its payload lies 16 bytes beyond a multiple of 32 on purpose: to a buffer that is aligned to 32 bytes libjpeg-turbo
    writes past the caches, which is 8 % slower for pixels that are read at once.
    """
    size = HEADER.size + raw_bytes(side)
    memory = np.empty(size + 32, np.uint8)
    start = -memory.ctypes.data % 32
    return memory[start : start + size]
