"""JPEGs with every kind of marker: valid files of many kinds, and damage to one segment of a file.

A JPEG is a list of segments: a marker, a length and the content; then the coded bytes of a scan. Damage to random bytes seldom
makes a segment of another kind that is well-formed, so this module inserts, replaces and moves whole segments.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Final

import numpy as np
import simplejpeg
from PIL import Image

from loader_service.data.codecs import SUBSAMPLINGS

SOI, EOI, SOS, DQT, DHT, DRI, DAC, DNL, COM, APP0 = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xCC, 0xDC, 0xFE, 0xE0

FRAMES: Final = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
"""SOF0 to SOF15: baseline, extended, progressive, lossless; from SOF9 on with arithmetic coding."""

ALONE: Final = (0x01, *range(0xD0, 0xD9))
"""Markers without a length: TEM, RST0 to RST7, SOI."""

OTHERS: Final = (0x02, 0xBF, 0xC8, 0xDE, 0xDF, 0xF0, 0xF7, 0xFD)
"""Reserved markers, JPG, DHP, EXP and JPG0 to JPG13."""


def segment(marker: int, content: bytes) -> bytes:
    """Return a segment with its marker and length."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def split(payload: bytes) -> list[bytes]:
    """Split a valid JPEG of one scan into SOI, its segments, the coded bytes, and EOI."""
    parts, at = [payload[:2]], 2
    while True:
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        parts.append(payload[at:end])
        if payload[at + 1] == SOS:
            return [*parts, payload[end:-2], payload[-2:]]
        at = end


def icc(number: int, count: int, content: bytes = b"profile") -> bytes:
    """Return part ``number`` of a colour profile of ``count`` parts."""
    return segment(0xE2, b"ICC_PROFILE\0" + bytes((number, count)) + content)


def exif(orientation: int) -> bytes:
    """Return an EXIF segment with an orientation."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))


def known_segments() -> list[list[bytes]]:
    """Return segments that cameras and editors write, sound and damaged; each list belongs together."""
    profile = [[icc(1, 1)], [icc(1, 2), icc(2, 2)], [icc(2, 2), icc(1, 2)]]
    damaged_profile = [
        *([icc(1, 2)], [icc(1, 1), icc(1, 1)], [icc(0, 1)], [icc(2, 1)], [icc(1, 0)], [icc(1, 2), icc(2, 3)]),
        *([icc(1, 1, b"")], [segment(0xE2, b"ICC_PROFILE\0")], [segment(0xE2, b"ICC_PROFILE\0\1")], [icc(255, 255)]),
    ]
    jfif = [
        *([segment(APP0, b"JFIF\0" + rest)] for rest in (b"\1\1\0\0\1\0\1\0\0", b"\2\1\0\0\1\0\1\0\0", b"\1\1", b"")),
        [segment(APP0, b"JFIF\0\1\2\1\0\1\0\1\3\3" + bytes(27))],  # with a thumbnail of 3 x 3 pixels
        [segment(APP0, b"JFIF\0\1\2\1\0\1\0\1\3\3" + bytes(5))],  # whose thumbnail is cut off
        [segment(APP0, b"JFXX\0\x10" + bytes(40))],
    ]
    adobe = [[segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes((how,)))] for how in (0, 1, 2, 9)]
    other = [
        *([exif(how)] for how in (1, 6, 9)),
        [segment(0xE1, b"Exif\0\0garbage")],
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")],
        [segment(0xE2, b"MPF\0II*\0")],
        [segment(0xED, b"Photoshop 3.0\x008BIM\4\4")],
        [segment(0xEE, b"Adobe\0")],
        [segment(COM, b"a comment")],
        [segment(COM, b"")],
    ]
    return [*profile, *damaged_profile, *jfif, *adobe, *other]


def any_segment(rng: Random, parts: list[bytes]) -> list[bytes]:
    """Return segments of any kind, well-formed or not, to insert among those of a file."""
    content = rng.randbytes(rng.choice((0, 1, 2, 6, 12, 14, 64, 300)))
    tables = [part for part in parts[1:-2] if part[1] in (DQT, DHT)]
    table = rng.choice(tables)
    choices: list[Callable[[], list[bytes]]] = [
        lambda: rng.choice(known_segments()),
        lambda: [segment(rng.randrange(0xE0, 0xF0), content)],
        lambda: [segment(rng.choice((COM, DQT, DHT, DRI, DAC, DNL, SOS, *OTHERS)), content)],
        lambda: [bytes((0xFF, rng.choice((*ALONE, EOI))))],
        lambda: [segment(DRI, struct.pack(">H", rng.choice((0, 1, 2, 5, 65535))))],
        lambda: [segment(DAC, bytes((rng.randrange(0x20), rng.randrange(256))))],
        lambda: [segment(DNL, struct.pack(">H", rng.randrange(65536)))],
        lambda: [table],
        lambda: [wide_table(table) if table[1] == DQT else table[:4] + bytes((table[4] ^ 2,)) + table[5:]],
        lambda: [segment(table[1], bytes((rng.randrange(0x24),)) + table[5:])],
        lambda: [segment(rng.choice(FRAMES), next(part for part in parts if part[1] in FRAMES)[4:])],
        lambda: [b"\xff" * rng.randint(1, 3)],  # fill bytes
        lambda: [rng.randbytes(rng.randint(1, 5))],  # garbage
        lambda: [struct.pack(">BBH", 0xFF, rng.randrange(0xC0, 0x100), rng.choice((0, 1, 2, 3, 65535))) + content],
    ]
    return rng.choice(choices)()


def wide_table(table: bytes) -> bytes:
    """Return a segment of 8-bit quantisation tables with 16-bit items in place of 8-bit ones."""
    wide = b""
    for at in range(4, len(table) - 64, 65):
        wide += bytes((0x10 | table[at],)) + b"".join(bytes((0, item)) for item in table[at + 1 : at + 65])
    return segment(DQT, wide)


def changed(rng: Random, part: bytes) -> bytes:
    """Return a segment with one change that its kind gives a meaning to."""
    marker, content = part[1], bytearray(part[4:])
    if marker in FRAMES:
        match rng.randrange(6):
            case 0:
                return segment(rng.choice(FRAMES), bytes(content))
            case 1:
                content[0] = rng.choice((2, 8, 12, 16))  # bits of a sample
            case 2:
                content[5] = rng.choice((0, 1, 2, 3, 4))  # components
            case 3:
                content[rng.choice((6, 9, 12)) % len(content)] = rng.choice((0, 1, 2, 3, 82, 255))  # their ids: R is 82
            case 4:
                content[rng.choice((7, 10, 13)) % len(content)] = rng.choice(
                    (0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0, 0x55)
                )
            case _:
                content[rng.randrange(1, 5)] ^= 1 << rng.randrange(8)  # height and width
    elif marker == SOS and len(content) > 3:
        at = rng.choice((0, 1, 2, len(content) - 3, len(content) - 2, len(content) - 1))
        content[at] = rng.choice((0, 1, 2, 3, 4, 5, 0x10, 0x11, 0x23, 63, 64, 255))
    elif marker == DQT:
        return wide_table(part) if rng.random() < 0.5 else segment(DQT, bytes((content[0] ^ 1,)) + bytes(content[1:]))
    elif content:
        content[rng.randrange(min(17, len(content)))] = rng.randrange(256)
    return segment(marker, bytes(content))


def damage_segment(rng: Random, payload: bytes) -> bytes:
    """Return a JPEG with one or two segments inserted, changed, removed, repeated or moved, or with other bytes at its end."""
    parts = split(payload)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(1, len(parts) - 2)  # a segment; the last two parts are coded bytes and EOI
        match rng.randrange(8):
            case 0 | 1 | 2:
                parts[at:at] = any_segment(rng, split(payload))
            case 3:
                # An inserted part may be shorter than a segment.
                parts[at] = changed(rng, parts[at]) if len(parts[at]) > 4 else parts[at]
            case 4:
                if len(parts) > 5:
                    del parts[at]
            case 5:
                parts.insert(rng.randrange(1, len(parts) - 2), parts[at])
            case 6:
                coded = parts[-2]
                middle = rng.randrange(len(coded) + 1)
                inside = bytes((0xFF, rng.choice((*ALONE, EOI, DNL, COM, 0xFF, 0x00))))
                parts[-2] = coded[:middle] + inside + coded[middle:]
            case _:
                parts[-1] = rng.choice(
                    (b"", b"\xff", b"\xff\xff\xd9", b"\x00\xff\xd9", b"\xff\xd9" * 2, b"\xff\xd9" + payload)
                )
    return b"".join(parts)


def files(rng: Random, shape: tuple[int, int]) -> list[bytes]:
    """Return valid JPEGs of noise of (height, width), of every kind that the libraries here can write.

    In each subsampling with small and large coefficients; progressive, with restart markers, with tables of their own, grey,
    CMYK, and with 16-bit quantisation tables.
    """
    noise = np.frombuffer(rng.randbytes(3 * shape[0] * shape[1]), np.uint8).reshape(*shape, 3)
    plain = [
        bytes(simplejpeg.encode_jpeg(noise, quality=quality, colorspace="RGB", colorsubsampling=subsampling))
        for quality in (5, 90, 100)
        for subsampling in (*SUBSAMPLINGS, "440", "411")
    ]
    image = Image.fromarray(noise)
    options: list[dict[str, Any]] = [
        *({"progressive": True}, {"restart_marker_blocks": 1}, {"restart_marker_rows": 1}, {"optimize": True}),
        *({"comment": b"c", "dpi": (72, 72)}, {"icc_profile": b"p" * 300, "exif": exif(6)[4:]}),
    ]
    saved = [_saved(image, **each) for each in options]
    saved += [_saved(image.convert(mode)) for mode in ("L", "CMYK")]
    wide = split(plain[0])
    return [*plain, *saved, b"".join(wide_table(part) if part[1] == DQT else part for part in wide)]


def _saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, **options)
    return file.getvalue()
