"""The codecs: encoding and decoding the payloads of records.

A stored value is HEADER, then the payload. The manifest gives the records' side. There are three codecs:

======== =====================================================================================================
raw      (side, side, 3) uint8 RGB in C order
jpeg     a JPEG of these pixels
centered (side, side, 3) little-endian int16 in C order: pixel minus the training split's mean image, in units of
         1 / 2**FRACTION_BITS grey levels
======== =====================================================================================================

``centered`` is lossless. The mean is rounded to the unit first, so adding it back gives the exact pixel; the rounded mean
is within 1/256 of a grey level of the manifest's. The largest difference, 255 * 128, fits into 16 bits.
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
"""Label, codec number, xxh3-64 of the payload: 16 bytes. The three bytes between are the seal (see checksums)."""

SHAPE: Final = (RECORD_SIDE_PX, RECORD_SIDE_PX, 3)
"""Shape of a record of the default side."""

Codec = Literal["raw", "jpeg", "centered"]
CODECS: Final[dict[Codec, int]] = {"raw": 0, "jpeg": 1, "centered": 2}  # on disk: a number never changes its meaning
"""Number of each codec in HEADER."""

FRACTION_BITS: Final = 7
"""255 * 2**7 is the largest power-of-two scaling of a grey level that fits into int16."""

SUBSAMPLINGS: Final = ("420", "422", "444")
"""Chroma subsamplings that :func:`encode` can write."""

DEFAULT_PARAMETERS: Final[dict[Codec, dict[str, int | str]]] = {
    "raw": {},
    "jpeg": {"quality": 90, "subsampling": "420"},
    "centered": {"fraction_bits": FRACTION_BITS},
}

Pixels = npt.NDArray[np.uint8]


def raw_bytes(side: int) -> int:
    """Return the bytes of a ``raw`` payload of ``side`` x ``side`` pixels."""
    return 3 * side * side


RAW_BYTES: Final = raw_bytes(RECORD_SIDE_PX)
"""Bytes of a ``raw`` payload of the default side."""


def header(label: int, codec: Codec, payload: bytes | memoryview) -> bytes:
    """Return the 16 bytes of HEADER for a payload, without a seal: the writer, which numbers records, adds it."""
    return HEADER.pack(label, CODECS[codec], xxhash.xxh3_64_intdigest(payload))


def encode(pixels: Pixels, codec: Literal["raw", "jpeg"], parameters: dict[str, int | str] | None = None) -> bytes:
    """Return the ``raw`` or ``jpeg`` payload of a record; for ``centered`` see :func:`encode_centred`.

    Args:
        pixels: (side, side, 3) uint8, RGB.
        codec: ``raw`` or ``jpeg``.
        parameters: for jpeg, ``quality`` (1..100) and ``subsampling`` ("420", "422", "444"); the default is 90, "420".

    Raises:
        ValueError: the array has another shape or dtype.
    """
    side = pixels.shape[0]
    if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"a record is (side, side, 3) uint8, not {pixels.shape} {pixels.dtype}")
    if codec == "raw":
        return pixels.tobytes()
    chosen = DEFAULT_PARAMETERS["jpeg"] | (parameters or {})
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),  # simplejpeg refuses rows that are not contiguous
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
    """Decode a ``raw`` or ``jpeg`` payload to (side, side, 3) uint8 RGB; of ``raw`` this is a view, not a copy.

    Args:
        payload: the stored payload.
        codec: number of ``raw`` or ``jpeg`` in :data:`CODECS`.
        into: (raw_bytes(side),) uint8, the buffer that a ``jpeg`` is decoded into; a new array if None.
        side: side of the record, in pixels.
        window: the part of a ``jpeg`` that is needed; pixels outside of it are undefined. None decodes the whole JPEG, by
            libjpeg-turbo.

    Raises:
        ValueError: the payload is damaged or of another codec, in the window or outside of it.
    """
    size, shape = raw_bytes(side), (side, side, 3)
    if codec == CODECS["raw"]:
        if len(payload) != size:
            raise ValueError(f"a raw payload has {size} bytes, this one {len(payload)}")
        # A view: of an LMDB page it is valid until the transaction ends.
        return np.frombuffer(payload, np.uint8).reshape(shape)
    if codec == CODECS["jpeg"]:
        # Always decode into a buffer of the record's size: simplejpeg then refuses a JPEG that claims to be huge.
        buffer = np.empty(size, np.uint8) if into is None else into
        # If this returns False, part of the buffer may be written; libjpeg-turbo then overwrites all of it.
        if window is not None and kernel.decode_window(payload, buffer, (side, side), window):
            return buffer.reshape(shape)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=buffer)
        except ValueError as error:
            raise ValueError(f"its JPEG cannot be decoded ({error})") from error
        if pixels.shape != shape:  # a smaller JPEG fits into the buffer, so simplejpeg accepts it
            raise ValueError(f"the JPEG decodes to {pixels.shape}, not {shape}")
        return pixels
    raise ValueError(f"codec number {codec} is unknown")


def centre_of(mean_image: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Return the mean image in the units of a ``centered`` payload.

    Args:
        mean_image: (side, side, 3) float32, 0..255.

    Returns:
        (side, side, 3) int16, 0 .. 255 * 2**FRACTION_BITS. Scaling by a power of two is exact, so every machine gets the
        same values.
    """
    # Without clip, a mean beyond 0..255 in a damaged manifest would overflow int16.
    return np.rint(np.ldexp(np.clip(mean_image, 0, 255), FRACTION_BITS)).astype(np.int16)


def encode_centred(pixels: npt.NDArray[np.uint8], centre: npt.NDArray[np.int16]) -> bytes:
    """Return the ``centered`` payload of a record.

    Args:
        pixels: (side, side, 3) uint8, RGB.
        centre: (side, side, 3) int16 from :func:`centre_of`.
    """
    scaled = np.left_shift(pixels.astype(np.int16), FRACTION_BITS)  # 0 .. 32,640
    return np.subtract(scaled, centre).astype("<i2", copy=False).tobytes()  # no conversion on a little-endian CPU


def decode_centred(
    payload: bytes | memoryview, centre: npt.NDArray[np.int16], into: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode a ``centered`` payload to (side, side, 3) uint8 RGB.

    Args:
        payload: the stored payload.
        centre: (side, side, 3) int16 from :func:`centre_of`, for the mean image that was subtracted.
        into: (centre.size,) uint8, the output buffer; a new array if None.

    Raises:
        ValueError: the payload has another length.
    """
    if len(payload) != 2 * centre.size:
        raise ValueError(f"a centered payload has {2 * centre.size} bytes, this one {len(payload)}")
    stored = np.frombuffer(payload, "<i2").reshape(centre.shape)
    out = (np.empty(centre.size, np.uint8) if into is None else into).reshape(centre.shape)
    scaled = np.add(stored, centre)  # int16; in a sound payload it is the pixel times 2**FRACTION_BITS
    np.right_shift(scaled, FRACTION_BITS, out=scaled)
    np.copyto(out, scaled, casting="unsafe")  # a damaged payload wraps around; its checksum tells
    return out


def raw_value(side: int = RECORD_SIDE_PX) -> npt.NDArray[np.uint8]:
    """Return memory for one raw record, header and payload: (16 + raw_bytes(side),) uint8.

    The payload lies 16 bytes past a multiple of 32 on purpose. Into a buffer aligned to 32 bytes, libjpeg-turbo writes with
    non-temporal stores, which bypass the caches: 8 % slower when the pixels are read at once.
    """
    size = HEADER.size + raw_bytes(side)
    memory = np.empty(size + 32, np.uint8)  # 32 more, to move the start by up to 31
    start = -memory.ctypes.data % 32  # the header starts at a multiple of 32, and has 16 bytes
    return memory[start : start + size]
