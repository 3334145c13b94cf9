"""Damaged JPEGs for the decoder of parts, which must agree with the libraries that it stands in for.

Bytes and segments of valid JPEGs are damaged (see ``segments``). The rules:

- As a record: a part has the pixels that libjpeg-turbo decodes there, and is refused if libjpeg-turbo refuses the whole.
- As a file to preprocess: the record has the same pixels with this decoder as without it, or both refuse the file.
"""

from __future__ import annotations

from random import Random
from typing import Final
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import simplejpeg

from loader_service.data import golden, image_file, kernel
from loader_service.data.kernel import Window
from loader_service.datasets.progress import Progress
from loader_service.errors import PictureError
from tools.errors import ToolFailed
from tools.fuzz.messages import damage_bytes
from tools.fuzz.segments import damage_segment, files

Shape = tuple[int, int]
"""Height and width, in pixels."""

SIDE: Final = golden.SIDE_PX
# Sides that are no multiples of 8 or 16 end in blocks that are cut off; images narrower than 16 are another kernel's.
SHAPES: Final[tuple[Shape, ...]] = ((SIDE, SIDE), (SIDE - 23, SIDE + 5), (SIDE + 9, 17))


class Corpus:
    """Valid JPEGs by their shape, from random numbers."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.valid = {shape: files(rng, shape) for shape in SHAPES}
        self.valid[SIDE, SIDE] += golden.jpegs()

    def damaged(self) -> tuple[bytes, Shape]:
        """Return a damaged JPEG, and the shape of the valid one."""
        rng = self._rng
        shape = rng.choice(SHAPES)
        payload = rng.choice(self.valid[shape])
        for _ in range(rng.randint(1, 2)):
            if rng.random() < 0.5:
                # Spliced with a JPEG of the same size only.
                payload = damage_bytes(rng, payload or b"\0", rng.choice(self.valid[shape]))
            else:
                payload = damage_segment(rng, rng.choice(self.valid[shape]))
        return payload, shape


def fuzz_jpegs(rng: Random, inputs: int, progress: Progress) -> tuple[int, int]:
    """Decode a part of each of many damaged JPEGs; return how many were decoded in part, and how many are refused.

    Raises:
        ToolFailed: pixels or refusals differ; the message has the input in hexadecimal.
    """
    corpus = Corpus(rng)
    in_part = refused = 0
    for _ in range(inputs):
        payload, shape = corpus.damaged()
        made, sound = compare(payload, shape, draw_window(rng, shape), rng.choice((3, 4)))
        in_part += made
        refused += not sound
        progress.advance()
    return in_part, refused


def draw_window(rng: Random, shape: Shape) -> Window:
    """Return any window of an image."""
    height, width = (rng.randint(1, length) for length in shape)
    return rng.randint(0, shape[0] - height), rng.randint(0, shape[1] - width), height, width


def compare(payload: bytes, shape: Shape, window: Window, item: int) -> tuple[bool, bool]:
    """Decode a JPEG in part and as a whole; return whether the part was decoded, and whether the whole can be.

    Args:
        payload: the JPEG.
        shape: expected height and width.
        window: the part.
        item: bytes of a pixel in the part's buffer: 3, or 4 with 255 as the last.

    Raises:
        ToolFailed: pixels or refusals differ; the message has the input in hexadecimal.
    """
    top, left, height, width = window
    into = np.empty((*shape, item), np.uint8)
    made = kernel.decode_window(payload, into.reshape(-1), shape, window)
    try:
        # Also if the kernel declined: the caller counts what libjpeg-turbo refuses.
        whole = _decode_whole(payload, shape)
    except ValueError as error:
        if made:
            raise ToolFailed(f"this JPEG is decoded in part, though {error}: {payload.hex()}.") from error
        return False, False
    part = np.s_[top : top + height, left : left + width, :3]  # other pixels of `into` are undefined
    if made and not np.array_equal(into[part], whole[part]):
        raise ToolFailed(f"{height} x {width} pixels at ({top}, {left}) differ: {payload.hex()}.")
    if made:
        record = preprocessed(payload)
        with patch.object(kernel, "decode_window", lambda *_: False):  # as on other processors
            if preprocessed(payload) != record:
                raise ToolFailed(f"this JPEG becomes another record with the decoder of parts: {payload.hex()}.")
    return made, True


def preprocessed(payload: bytes) -> bytes:
    """Return the pixels of the record that preprocessing makes of a file; empty if it refuses the file."""
    try:
        return image_file.load_picture(payload, side=SIDE).tobytes()
    except PictureError:
        return b""


def _decode_whole(payload: bytes, shape: Shape) -> npt.NDArray[np.uint8]:
    """Decode a JPEG of this (height, width) with libjpeg-turbo: (height, width, 3) uint8.

    Raises:
        ValueError: it has another size, or is damaged.
    """
    # A buffer of the right size: a JPEG whose header claims a huge image does not fit, and allocates nothing.
    buffer = np.empty(3 * shape[0] * shape[1], np.uint8)
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=buffer)
    if pixels.shape[:2] != shape:
        raise ValueError(f"it decodes to {pixels.shape}")
    return pixels
