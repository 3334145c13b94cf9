"""An image file becomes the pixels of a record, or an error with the reason."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps, features

from loader_service.data import kernel
from loader_service.data.image_file import FILTER, MAX_PIXELS, load_picture
from loader_service.errors import PictureError

CORNERS = ((230, 20, 20), (20, 200, 20), (20, 20, 220), (240, 240, 20))
"""Colours of the four quarters of a test picture: top left, top right, bottom left, bottom right."""


def quarters(width: int = 300, height: int = 300, mode: str = "RGB") -> Image.Image:
    """Return an image whose four quarters have the colours of CORNERS."""
    pixels = np.empty((height, width, 3), np.uint8)
    top, left = slice(None, height // 2), slice(None, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    for (rows, columns), colour in zip(
        ((top, left), (top, right), (bottom, left), (bottom, right)), CORNERS, strict=True
    ):
        pixels[rows, columns] = colour
    return Image.fromarray(pixels).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def corners_of(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the colours at the centres of the four quarters: (4, 3)."""
    return pixels[[64, 64, 192, 192], [64, 192, 64, 192]].astype(np.int64)


def assert_quarters(pixels: npt.NDArray[np.uint8], tolerance: int = 0) -> None:
    """Assert that the four quarters have the colours of CORNERS."""
    assert pixels.shape == (256, 256, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(corners_of(pixels) - np.array(CORNERS)).max() <= tolerance


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 300), (64, 48), (1003, 511)])
def test_the_centre_square_of_the_short_side_is_kept(width: int, height: int) -> None:
    """The record is the resized centre square of the image."""
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height))
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    whole = np.asarray(image.resize((256, 256), FILTER, box=(left, top, left + short, top + short)))
    assert np.array_equal(load_picture(file_of(image)), whole)


def test_a_path_and_its_content_give_the_same(tmp_path: Path) -> None:
    """A path and its content give the same contiguous array."""
    path = tmp_path / "picture.png"
    path.write_bytes(file_of(quarters()))
    pixels = load_picture(path)
    assert np.array_equal(pixels, load_picture(path.read_bytes()))
    assert pixels.flags.c_contiguous


@pytest.fixture
def decoded_in_part(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each image whether kernel.decode_window decoded it."""
    true, answers = kernel.decode_window, list[bool]()

    def decode_window(*args: Any) -> bool:
        answers.append(true(*args))
        return answers[-1]

    monkeypatch.setattr(kernel, "decode_window", decode_window)
    return answers


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
@pytest.mark.parametrize(
    ("width", "height"),
    [
        (500, 375),
        (375, 500),
        (501, 334),
        (333, 500),
        (256, 256),
        (511, 1024),
        (700, 300),
        (64, 48),
        (257, 16),
        (17, 900),
    ],
)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_decoding_only_the_square_gives_the_same_record(
    width: int, height: int, subsampling: int, decoded_in_part: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG that is decoded in part gives the same record as Pillow's whole decode, whatever the record's side."""
    noise = np.random.Generator(np.random.Philox(key=width)).integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    content = file_of(image, "JPEG", quality=92, subsampling=subsampling)
    sides = [side for side in (16, 100, 256, 300, 512) if min(width, height) < 2 * side]  # others: DCT scaling
    found = [load_picture(content, side=side) for side in sides]
    assert decoded_in_part == [True] * len(sides)
    monkeypatch.setattr(kernel, "decode_window", lambda *_: False)
    for pixels, side in zip(found, sides, strict=True):
        np.testing.assert_array_equal(pixels, load_picture(content, side=side))


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_rows": 1}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
    ids=["progressive", "restarts", "stored as RGB", "grey", "CMYK"],
)
def test_other_jpegs_are_left_to_pillow(mode: str, options: dict[str, Any], decoded_in_part: list[bool]) -> None:
    """Pillow decodes the kinds of JPEGs that the records' decoder does not support."""
    pixels = load_picture(file_of(quarters(400, 300, mode), "JPEG", quality=95, **options))
    assert True not in decoded_in_part
    if mode != "L":
        assert_quarters(pixels, tolerance=12)


@pytest.mark.parametrize("side", [600, 1024, 2100])
def test_dct_scaling_keeps_what_a_full_decode_gives(side: int) -> None:
    """A JPEG decoded at a fraction of its size gives nearly the pixels of the whole decode."""
    y, x = np.mgrid[:side, : side + 101]
    smooth = 120 + 60 * np.sin(x / side * 20) + 50 * np.cos(y / side * 13)
    image = Image.fromarray(np.stack([smooth, 240 - smooth, smooth], axis=-1).astype(np.uint8))
    small = load_picture(file_of(image, "JPEG", quality=97, subsampling=0)).astype(np.float64)
    full = load_picture(file_of(image)).astype(np.float64)
    assert np.abs(small - full).mean() < 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """Every EXIF orientation gives an upright record."""
    stored = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }[orientation]
    image = quarters(400, 320)
    for turn in stored:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_quarters(load_picture(file_of(image, kind, exif=exif)), tolerance=12)


def test_damaged_exif_costs_no_picture() -> None:
    """Damaged metadata does not make an image unusable."""
    assert_quarters(load_picture(file_of(quarters(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), tolerance=12)


def test_grey_becomes_three_equal_channels() -> None:
    """Grey, one-bit and 16-bit grey images become RGB with the right level."""
    levels = np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[None], 256, axis=0)
    expected = np.repeat(((levels.astype(np.int64) * 255 + 32767) // 65535)[..., None], 3, axis=-1)
    assert np.array_equal(load_picture(file_of(Image.fromarray(levels))), expected)
    eight = Image.fromarray(expected[..., 0].astype(np.uint8))
    assert np.array_equal(load_picture(file_of(eight)), expected)
    bits = Image.fromarray(levels > 30000)
    assert np.array_equal(load_picture(file_of(bits)), np.where(levels > 30000, 255, 0)[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["P", "RGBA", "RGB"])
def test_colour_modes_become_rgb(mode: str) -> None:
    """Palettes and opaque alpha change nothing."""
    assert_quarters(load_picture(file_of(quarters(mode=mode))), tolerance=0 if mode != "P" else 30)


def test_transparency_is_laid_on_white() -> None:
    """Transparent pixels become white whatever their colour, with RGBA, grey alpha and palettes."""
    image = quarters(mode="RGBA")
    image.putalpha(0)
    assert (load_picture(file_of(image)) == 255).all()
    assert (load_picture(file_of(Image.new("LA", (300, 300), (0, 0)))) == 255).all()
    palette = quarters().quantize(16)
    pixels = load_picture(file_of(palette, transparency=palette.getpixel((0, 0))))
    assert (corners_of(pixels)[0] == 255).all()
    assert (corners_of(pixels)[1:] < 250).all()
    half = Image.new("RGBA", (300, 300), (0, 0, 0, 128))
    assert abs(int(load_picture(file_of(half))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("adobe", [False, True])
def test_cmyk_becomes_rgb(adobe: bool) -> None:
    """CMYK JPEGs, with Adobe's inverted values or in a TIFF without, get their colours right."""
    image = quarters(mode="CMYK")
    content = file_of(image, "JPEG", quality=95) if adobe else file_of(image, "TIFF")
    assert_quarters(load_picture(content), tolerance=12)


def test_ycck_becomes_rgb() -> None:
    """A JPEG whose Adobe marker says YCCK (YCbCr of the inverted inks) gets its colours right."""
    inks = [band.point(lambda value: 255 - value) for band in ImageOps.invert(quarters()).convert("YCbCr").split()]
    stored = Image.merge("CMYK", [*inks, Image.new("L", inks[0].size, 0)])
    content = bytearray(file_of(stored, "JPEG", quality=95))
    content[content.index(b"Adobe") + 11] = 2  # the marker's last byte: no longer CMYK, but YCCK
    assert_quarters(load_picture(bytes(content)), tolerance=12)


def test_a_colour_profile_changes_nothing() -> None:
    """A colour profile, sound or damaged, does not change the pixels."""
    plain = load_picture(file_of(quarters(), "JPEG"))
    assert np.array_equal(load_picture(file_of(quarters(), "JPEG", icc_profile=bytes(range(200)))), plain)


def test_sixteen_bits_a_channel_become_eight() -> None:
    """A PNG of 48-bit RGB keeps the upper half of each value."""
    rows = (np.asarray(quarters(256, 256)).astype(np.uint16) * 256 + 77).astype(">u2")
    content = png(256, 256, b"".join(b"\0" + row.tobytes() for row in rows), depth=16)
    assert_quarters(load_picture(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "TGA"])
def test_formats_are_found_by_content(kind: str, tmp_path: Path) -> None:
    """Any format is read under the name .JPEG."""
    path = tmp_path / "n01440764_1.JPEG"
    path.write_bytes(file_of(quarters(mode="P" if kind == "GIF" else "RGB"), kind))
    assert_quarters(load_picture(path), tolerance=30)


def test_a_progressive_jpeg_is_read() -> None:
    """Progressive JPEG is decoded whole."""
    assert_quarters(load_picture(file_of(quarters(), "JPEG", progressive=True)), tolerance=12)


def test_an_animation_counts_as_its_first_picture() -> None:
    """An animation gives its first frame."""
    frames = [Image.new("RGB", (300, 300), "black") for _ in range(3)]
    content = file_of(quarters(mode="P"), "GIF", save_all=True, append_images=frames)
    assert_quarters(load_picture(content), tolerance=30)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_tiny_sides_are_enlarged(size: tuple[int, int]) -> None:
    """Images with a side of one pixel are enlarged."""
    assert (load_picture(file_of(Image.new("RGB", size, (9, 99, 199)))) == (9, 99, 199)).all()


def png(width: int, height: int, rows: bytes = bytes(999), depth: int = 8) -> bytes:
    """Return an RGB PNG that claims a size and holds these filtered rows, by default too few."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"this is not a picture at all", "in no known image format"),
    "web page": (lambda: b"<!DOCTYPE html><title>404</title>", "a web page"),
    "pdf": (lambda: b"%PDF-1.7 ...", "a PDF"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is a program"),
    "header only": (lambda: file_of(quarters(), "JPEG")[:20], "a JPEG whose header is damaged"),
    "half a jpeg": (lambda: file_of(quarters(), "JPEG")[:1500], "truncated"),
    "half a png": (lambda: file_of(quarters())[:200], "cannot be decoded"),
    "bomb": (lambda: png(60_000, 60_000), f"more than {MAX_PIXELS} pixels"),
    "just too large": (lambda: png(10_000, 8_948), f"more than {MAX_PIXELS}"),
    "too little data": (lambda: png(500, 500), "cannot be decoded"),
    "no width": (lambda: png(0, 500), "a PNG whose header is damaged"),
    "float": (lambda: file_of(Image.new("F", (300, 300), 0.5), "TIFF"), "floating-point"),
    "32 bits": (lambda: file_of(Image.new("I", (300, 300), 70_000), "TIFF"), "32-bit"),
    "random": (lambda: np.random.Generator(np.random.Philox(key=2)).bytes(5000), "it is in no known"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(name: str) -> None:
    """A file that cannot be used gives an error with its name and the reason."""
    make, reason = HOSTILE[name]
    with pytest.raises(PictureError) as caught:
        load_picture(make(), source="album/x.jpg")
    assert caught.value.source == "album/x.jpg"
    assert reason in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.skipif(features.check("webp"), reason="this build of Pillow reads WebP")
def test_a_format_that_this_build_lacks_is_named() -> None:
    """The error for a WebP says that this build of Pillow cannot read the format."""
    with pytest.raises(PictureError, match="WebP, which this build"):
        load_picture(b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(40))


def test_every_truncation_is_refused_or_whole() -> None:
    """A JPEG or PNG that is cut off anywhere is refused."""
    for content in (file_of(quarters(), "JPEG"), file_of(quarters())):
        for end in range(0, len(content) - 12, 97):
            with pytest.raises(PictureError):
                load_picture(content[:end])


def test_no_damage_raises_another_error() -> None:
    """Bytes changed at random give a picture or a PictureError, and nothing else."""
    rng = np.random.Generator(np.random.Philox(key=3))
    originals = [
        file_of(quarters(64, 64, "P" if kind == "GIF" else "RGB"), kind) for kind in ("JPEG", "PNG", "GIF", "TIFF")
    ]
    refused = 0
    for trial in range(400):
        content = np.frombuffer(originals[trial % len(originals)], np.uint8).copy()
        content[rng.integers(0, min(len(content), 700), 8)] = rng.integers(0, 256, 8)
        try:
            assert load_picture(content.tobytes()).shape == (256, 256, 3)
        except PictureError:
            refused += 1
    assert 0 < refused < 400


def test_pipes_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    """A pipe, a folder and a missing file are refused at once."""
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, reason in (
        (tmp_path / "pipe.jpg", "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "no.jpg", "No such file"),
    ):
        with pytest.raises(PictureError, match=reason) as caught:
            load_picture(path)
        assert str(path) in str(caught.value)
