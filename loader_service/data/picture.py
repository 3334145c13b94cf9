"""One picture file -> the pixels of a record: short side to 256, centre crop (AlexNet paper, section 2).

What is made of each kind of file:

- The short side becomes 256, or what the caller says, by a bicubic filter with antialiasing, and the centre square is kept.
  Both happen at once: the centre square of the original is resized, nothing else. A JPEG at least twice as large is decoded
  at 1/2, 1/4 or 1/8 of its size (DCT scaling), as near to the wanted one from above as that goes; against a full decode this
  keeps 42 dB on photographs. Of smaller ones no more is decoded than the square needs, by the decoder that records have
  (kernel.py), where it can: to the bytes that libjpeg-turbo gives Pillow.
- EXIF orientation is applied: the record stands as a viewer would show the file.
- Grey becomes three equal channels; 16-bit grey is scaled to 8 bits; palettes are looked up; what is transparent is laid
  on white; CMYK and YCCK (Adobe's inverted ones too) become RGB. Colour profiles are not applied: Pillow-SIMD is mostly
  built without LittleCMS, and pixels must not depend on that.
- Of an animation or a multi-page file, the first picture counts.
- The format is found by the file's content, never by its name. Formats that Pillow would give to another program
  (EPS to Ghostscript) are not opened.
- A picture of more than MAX_PIXELS is refused before it is decoded; a truncated one is refused.
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
"""Largest picture, in pixels: Pillow's own warning limit. It takes 340 MiB while it is decoded."""

MAX_FILE_BYTES: Final = 2**28
"""Largest file; MAX_PIXELS of uncompressed RGB fit."""

FILTER: Final = Image.Resampling.BICUBIC
"""As fast as bilinear here (0.23 against 0.22 ms for a 500 x 375 original) and sharper; Lanczos costs half as much again."""

_SUPPORT: Final = 2
"""So many pixels of the result beside one count in it, by FILTER."""

FORMATS: Final = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"),
    *("TGA", "DIB", "ICO", "PCX", "SGI", "QOI"),
)
"""What may be opened, as far as this build of Pillow can."""

RECIPE: Final = "bicubic, centre square, DCT scaling, EXIF orientation, white behind transparency"
"""Goes into the manifest with LIBRARY; change it whenever the pixels change."""

LIBRARY: Final = f"pillow{'-simd' if '.post' in PIL.__version__ else ''} {PIL.__version__}"
"""Which library decodes and resizes: other ones give other pixels."""

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
"""What brings each EXIF orientation upright."""

_SIGNATURES: Final = (
    (0, b"\xff\xd8", "a JPEG whose header is damaged or cut off"),
    (0, b"\x89PNG", "a PNG whose header is damaged or cut off"),
    (0, b"<", "a web page or another text, not a picture"),
    (0, b"%PDF", "a PDF, not a picture"),
    (0, b"%!PS", "PostScript, which is not opened because it is a program"),
    (8, b"WEBP", "WebP, which this build of Pillow cannot read"),
    (4, b"ftypheic", "HEIC, which Pillow cannot read"),
    (4, b"ftypavif", "AVIF, which this build of Pillow cannot read"),
    (4, b"jP  ", "JPEG 2000, which this build of Pillow cannot read"),
)
"""Offset, bytes and name of what people have among their pictures that Pillow does not open."""


def load_picture(
    picture: Path | bytes | memoryview, *, source: str | None = None, side: int = RECORD_SIDE_PX
) -> npt.NDArray[np.uint8]:
    """The pixels of a record, made from a picture file.

    Args:
        picture: a file's path, or its content.
        source: what to call it in an error; the path by default.
        side: width and height of the result, in pixels.

    Returns:
        (side, side, 3) uint8, RGB, contiguous and read-only.

    Raises:
        PictureError: it cannot be used; the reason says why.
    """
    if source is None:
        source = str(picture) if isinstance(picture, Path) else "the picture"
    content = read_content(picture, source) if isinstance(picture, Path) else picture
    if not content:
        raise PictureError(source, "it is empty")
    # What Pillow warns of (large pictures, odd metadata) is either checked here or without meaning for the pixels.
    with warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                return np.asarray(_standardise(image, content, side, source))
        except PictureError:
            raise
        except PIL.UnidentifiedImageError as error:
            raise PictureError(source, f"it is {_name_unknown(content)}") from error
        except Image.DecompressionBombError as error:
            raise PictureError(source, f"it has more than {MAX_PIXELS} pixels") from error
        except MemoryError as error:
            raise PictureError(source, "there is not enough memory to decode it") from error
        except Exception as error:  # Pillow's decoders document no errors: any can come of content that breaks a format
            raise PictureError(source, f"it cannot be decoded ({_first_line(error)})") from error


def read_content(path: Path, source: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or ``size`` of them from ``offset`` on; a pipe or a device is not waited for.

    Raises:
        PictureError: it cannot be read, is no regular file, is too large, or ends too early.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(source, "it is not a regular file")
            wanted = status.st_size - offset if size is None else size
            if wanted > MAX_FILE_BYTES:
                raise PictureError(source, f"it has {wanted} bytes, more than {MAX_FILE_BYTES}")
            file.seek(offset)
            content = file.read(wanted)
    except OSError as error:
        raise PictureError(source, f"it cannot be read ({error.strerror})") from error
    if len(content) < wanted:
        raise PictureError(source, f"it ends after {len(content)} of {wanted} bytes")
    return content


def _standardise(image: Image.Image, content: bytes | memoryview, side: int, source: str) -> Image.Image:
    """The upright centre square of a picture that has been opened but not decoded, in RGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(source, f"it has {width} x {height} pixels, more than {MAX_PIXELS} together")
    drafted = image.draft(None, (side, side))  # JPEG only; with the original's size by 1, 2, 4 or 8, not rounded
    size: tuple[float, float] = drafted[1][2:] if drafted else image.size
    plain = None
    if drafted and size == (width, height) and _pillow_has_libjpeg_turbo():
        plain = _decode_middle(image, content, side)
    if plain is None:
        image.load()
        plain = _plain(image, source)
        size = size if drafted else image.size  # a TIFF may have been turned
    turn = _UPRIGHT.get(_orientation(image))  # after loading: Pillow turns TIFF files itself, and then says 1
    short = min(size)
    left, top = (size[0] - short) / 2, (size[1] - short) / 2
    square = plain.resize((side, side), FILTER, box=(left, top, left + short, top + short))
    if turn is not None:
        square = square.transpose(turn)  # a centred square turns into itself, so turning the small one is the same
    return square if square.mode == "RGB" else square.convert("RGB")


@cache
def _pillow_has_libjpeg_turbo() -> bool:
    """Whether Pillow's own pixels are those of libjpeg-turbo: other libraries of that name upsample colours otherwise."""
    return bool(features.check("libjpeg_turbo"))


def _decode_middle(image: Image.Image, content: bytes | memoryview, side: int) -> Image.Image | None:
    """A JPEG as "RGBX", with pixels where the centre square's ``side`` by ``side`` need them; None where only Pillow can."""
    width, height = image.size
    if image.mode != "RGB" or image.format != "JPEG" or max(width, height) > MAX_SIDE_PX:
        return None
    short = min(width, height)
    margin = ceil(_SUPPORT * max(1, short / side)) + 1
    left, top = (max(0, (length - short) // 2 - margin) for length in (width, height))
    window = (top, left, min(height, height - 2 * top), min(width, width - 2 * left))
    pixels = np.empty(4 * width * height, np.uint8)
    if not kernel.decode_window(content, pixels, (height, width), window):
        return None
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read: metadata never costs a picture."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever a damaged block makes Pillow's parser raise
        return 1
    return value if isinstance(value, int) else 1


def _plain(image: Image.Image, source: str) -> Image.Image:
    """The same picture as 8-bit grey ("L") or RGB, without transparency."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image).astype(np.uint32))
    if image.mode == "I":
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
    """16-bit grey values, scaled so that 65535 is 255 and rounded, as an "L" picture."""
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _name_unknown(content: bytes | memoryview) -> str:
    """What a file is that Pillow did not recognise."""
    head = bytes(content[:64])
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    return "in no known picture format"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
