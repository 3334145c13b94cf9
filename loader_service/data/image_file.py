"""Conversion of an image file to a record's pixels: resize the short side to 256, crop the centre (AlexNet paper, section 2).

Rules for the kinds of files:

- The short side becomes 256 pixels, or ``side``, by a bicubic filter with antialiasing, and the centre square is kept. Both
  happen in one step: only the centre square of the original is resized. A JPEG at least twice as large is decoded at 1/2,
  1/4 or 1/8 of its size (DCT scaling), the smallest that is still large enough; against a full decode this keeps 42 dB on
  photographs. From a smaller JPEG only the part that the square needs is decoded, by the records' own decoder (kernel.py) if
  it can, to the same bytes that libjpeg-turbo gives Pillow.
- EXIF orientation is applied: the record is upright, as a viewer shows the file.
- Grey becomes three equal channels. 16-bit grey is scaled to 8 bits. Palettes are looked up. Transparent pixels are
  blended with white. CMYK and YCCK (also Adobe's inverted ones) become RGB. Colour profiles are ignored: most builds of
  Pillow-SIMD lack LittleCMS, and pixels must not depend on the build.
- Of an animation or a multi-page file, the first image is used.
- The format is detected from the content, never from the name. Formats that Pillow hands to another program (EPS to
  Ghostscript) are not opened.
- An image of more than MAX_PIXELS is rejected before it is decoded. A truncated image is rejected.
"""

from __future__ import annotations

import os
import stat
import warnings
from functools import cache
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from loader_service.data import kernel
from loader_service.errors import PictureError
from loader_service.types import MAX_SIDE_PX, RECORD_SIDE_PX

MAX_PIXELS: Final = 89_478_485
"""Largest image, in pixels: Pillow's own warning limit. Decoding one takes 340 MiB."""

MAX_FILE_BYTES: Final = 2**28
"""Largest file; MAX_PIXELS of uncompressed RGB fit."""

FILTER: Final = Image.Resampling.BICUBIC
"""Almost as fast as bilinear (0.23 against 0.22 ms for a 500 x 375 original) and sharper; Lanczos costs 50 % more."""

_SUPPORT: Final = 2
"""Radius of FILTER, in pixels of the result."""

FORMATS: Final = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"),
    *("TGA", "DIB", "ICO", "PCX", "SGI", "QOI"),
)
"""Formats that may be opened, if this build of Pillow supports them."""

RECIPE: Final = "bicubic, centre square, DCT scaling, EXIF orientation, white behind transparency"
"""Stored in the manifest with LIBRARY, and part of an input's identity: change it whenever the pixels change."""

LIBRARY: Final = f"pillow{'-simd' if '.post' in PIL.__version__ else ''} {PIL.__version__}"
"""The library that decodes and resizes; another one gives other pixels. Only pillow-simd's versions have ".post"."""

_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes each EXIF orientation upright; 1 needs none."""

_SIGNATURES: Final = (
    (0, b"\xff\xd8", "a JPEG whose header is damaged or cut off"),
    (0, b"\x89PNG", "a PNG whose header is damaged or cut off"),
    (0, b"<", "a web page or another text, not an image"),
    (0, b"%PDF", "a PDF, not an image"),
    (0, b"%!PS", "PostScript, which is not opened because it is a program"),
    (8, b"WEBP", "WebP, which this build of Pillow cannot read"),
    (4, b"ftypheic", "HEIC, which Pillow cannot read"),
    (4, b"ftypavif", "AVIF, which this build of Pillow cannot read"),
    (4, b"jP  ", "JPEG 2000, which this build of Pillow cannot read"),
)
"""Offset, first bytes and name of files often found among images that Pillow does not open, for a better reason."""


def load_picture(
    picture: Path | bytes | memoryview, *, source: str | None = None, side: int = RECORD_SIDE_PX
) -> npt.NDArray[np.uint8]:
    """Decode an image file to the pixels of a record.

    Args:
        picture: path of the file, or its content.
        source: name of the file in errors; the path by default.
        side: width and height of the result, in pixels.

    Returns:
        (side, side, 3) uint8, RGB, contiguous and read-only.

    Raises:
        PictureError: the file cannot be used; the error has the reason.
    """
    if source is None:
        source = str(picture) if isinstance(picture, Path) else "the image"
    content = read_content(picture, source) if isinstance(picture, Path) else picture
    if not content:
        raise PictureError(source, "it is empty")
    # Pillow warns of large images, which are checked here, and of odd metadata, which does not change the pixels.
    with warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                return np.asarray(_standardise(image, content, side, source))
        except PictureError:
            raise
        except PIL.UnidentifiedImageError as error:
            raise PictureError(source, f"it is {_name_unknown(content)}") from error
        except Image.DecompressionBombError as error:  # Pillow raises it above twice its warning limit
            raise PictureError(source, f"it has more than {MAX_PIXELS} pixels") from error
        except MemoryError as error:
            raise PictureError(source, "there is not enough memory to decode it") from error
        except Exception as error:  # Pillow documents no errors of its decoders: a damaged file can raise any
            raise PictureError(source, f"it cannot be decoded ({_first_line(error)})") from error


def read_content(path: Path, source: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a regular file, or ``size`` bytes from ``offset`` on, without blocking on a pipe or device.

    Raises:
        PictureError: the file cannot be read, is not a regular file, is too large, or ends too early.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)  # of the open file: the name may mean another file by now
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(source, "it is not a regular file")
            wanted = status.st_size - offset if size is None else size
            if wanted > MAX_FILE_BYTES:
                raise PictureError(source, f"it has {wanted} bytes, more than {MAX_FILE_BYTES}")
            file.seek(offset)
            content = file.read(wanted)  # one system call: Linux reads up to 2 GiB at once
    except OSError as error:
        raise PictureError(source, f"it cannot be read ({error.strerror})") from error
    if len(content) < wanted:
        raise PictureError(source, f"it ends after {len(content)} of {wanted} bytes")
    return content


def _standardise(image: Image.Image, content: bytes | memoryview, side: int, source: str) -> Image.Image:
    """Return the upright centre square of an image that is open but not decoded, as RGB of ``side`` x ``side``."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(source, f"it has {width} x {height} pixels, more than {MAX_PIXELS} together")
    # DCT scaling, of JPEGs only: the result has the size after scaling by 1, 2, 4 or 8 as floats, before rounding.
    drafted = image.draft(None, (side, side))
    size: tuple[float, float] = drafted[1][2:] if drafted else image.size
    plain = None
    # Only without DCT scaling, which the kernel's decoder does not have.
    if drafted and size == (width, height) and _pillow_has_libjpeg_turbo():
        plain = _decode_middle(image, content, side)
    if plain is None:
        image.load()
        plain = _plain(image, source)
        size = size if drafted else image.size  # loading a TIFF applies its orientation, which may swap the sides
    turn = _UPRIGHT.get(_orientation(image))  # after loading: Pillow then reports orientation 1 for a TIFF
    short = min(size)
    left, top = (size[0] - short) / 2, (size[1] - short) / 2
    # The box may lie between pixels. It is cropped and resized in one step, without a copy.
    square = plain.resize((side, side), FILTER, box=(left, top, left + short, top + short))
    if turn is not None:
        square = square.transpose(turn)  # a centred square stays in place, so rotating the resized one is the same
    return square if square.mode == "RGB" else square.convert("RGB")  # cheaper than before the resize


@cache
def _pillow_has_libjpeg_turbo() -> bool:
    """Return True if Pillow decodes JPEGs with libjpeg-turbo; other libjpegs upsample chroma to other pixels."""
    return bool(features.check("libjpeg_turbo"))


def _decode_middle(image: Image.Image, content: bytes | memoryview, side: int) -> Image.Image | None:
    """Decode the part of a JPEG that its centre square needs; return an "RGBX" image, or None if only Pillow can decode it.

    Pixels that a resize of the centre square to ``side`` x ``side`` does not read are undefined.
    """
    width, height = image.size
    # The decoder's planes fit MAX_SIDE_PX rows and columns (_jpeg.c).
    if image.mode != "RGB" or image.format != "JPEG" or max(width, height) > MAX_SIDE_PX:
        return None
    short = min(width, height)
    # The filter reaches _SUPPORT pixels of the result beyond the square; + 1 covers the rounding of its window.
    margin = ceil(_SUPPORT * max(1, short / side)) + 1
    left, top = (max(0, (length - short) // 2 - margin) for length in (width, height))
    window = (top, left, height - 2 * top, width - 2 * left)
    pixels = np.empty(4 * width * height, np.uint8)  # 4 bytes a pixel: Pillow's own layout of RGB, so no copy is made
    if not kernel.decode_window(content, pixels, (height, width), window):
        return None
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none, or if damaged metadata hides it."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block can raise any error in Pillow's parser; the pixels may be sound
        return 1
    return value if isinstance(value, int) else 1


def _plain(image: Image.Image, source: str) -> Image.Image:
    """Convert an image to 8-bit grey ("L") or RGB, without transparency."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image).astype(np.uint32))
    if image.mode == "I":  # 32-bit integers; a 16-bit PGM has this mode too
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PictureError(source, "its grey values are 32-bit integers, which have no defined white")
        return _eight_bits(values)
    if image.mode == "F":
        raise PictureError(source, "its grey values are floating-point numbers, which have no defined white")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(values: npt.NDArray[np.generic]) -> Image.Image:
    """Scale 16-bit grey values to 8 bits, 65535 to 255, rounded; return an "L" image."""
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))  # 24 bits at most


def _name_unknown(content: bytes | memoryview) -> str:
    """Return a description of a file that Pillow did not recognise, to follow "it is"."""
    head = bytes(content[:64])
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    return "in no known image format"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
