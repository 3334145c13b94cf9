"""Damaged JPEGs of every kind of marker: all decoders agree, and proof that the tool finds one that does not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from loader_service.data import kernel
from loader_service.datasets.progress import Progress
from tools.errors import ToolFailed
from tools.fuzz.jpegs import SHAPES, Shape, compare, draw_window, fuzz_jpegs
from tools.fuzz.segments import (
    ALONE,
    APP0,
    COM,
    DAC,
    DHT,
    DNL,
    DQT,
    DRI,
    EOI,
    FRAMES,
    OTHERS,
    SOI,
    SOS,
    damage_segment,
    exif,
    files,
    icc,
    known_segments,
    segment,
    split,
)


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_jpegs(seed: int) -> None:
    """Parts have libjpeg-turbo's pixels or its refusals; enough are decoded in part to reach deep into the decoder."""
    with Progress("jpegs", 3000, "inputs") as progress:
        in_part, refused = fuzz_jpegs(Random(seed), 3000, progress)
    assert in_part > 100
    assert refused > 1500


@pytest.mark.parametrize("decode_window", [lambda *_: True, lambda _, into, *__: into.fill(7) or True])
def test_a_broken_decoder_of_jpegs_is_found(
    monkeypatch: pytest.MonkeyPatch, decode_window: Callable[..., bool]
) -> None:
    """A decoder that accepts what libjpeg-turbo refuses, or makes other pixels, fails with the input in the message."""
    monkeypatch.setattr(kernel, "decode_window", decode_window)
    with pytest.raises(ToolFailed, match=r" [0-9a-f]*\.$"), Progress("jpegs", 100, "inputs") as progress:
        fuzz_jpegs(Random(1), 100, progress)


def test_segments_of_every_kind_are_tried() -> None:
    """The damage inserts every marker that T.81 defines, and colour profiles, EXIF, Adobe and JFIF segments."""
    rng = Random(1)
    [payload, *_] = files(rng, SHAPES[0])
    tried = b"".join(damage_segment(rng, payload) for _ in range(4000))
    markers = [*FRAMES, *ALONE, *OTHERS, SOI, EOI, SOS, DQT, DHT, DRI, DAC, DNL, COM, *range(APP0, APP0 + 16)]
    assert [hex(marker) for marker in markers if bytes((0xFF, marker)) not in tried] == []
    assert all(name in tried for name in (b"ICC_PROFILE\0", b"Exif\0\0", b"Adobe", b"JFXX\0", b"8BIM"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_known_segment(shape: Shape) -> None:
    """Whatever segments a camera or an editor writes, sound or damaged, the decoders agree on each kind of file."""
    rng = Random(2)
    for payload in files(rng, shape):
        first, *rest = split(payload)
        for group in known_segments():
            compare(b"".join((first, *group, *rest)), shape, draw_window(rng, shape), 3)


def test_sound_profiles_and_metadata_are_decoded_in_part() -> None:
    """A file with a whole colour profile, EXIF and comments does not need the slower decoder."""
    if not kernel.decodes_windows():
        pytest.skip("no compiled decoder for this processor")
    first, *rest = split(files(Random(3), SHAPES[0])[0])
    payload = b"".join((first, icc(1, 1), exif(1), segment(COM, b"a comment"), *rest))
    assert compare(payload, SHAPES[0], (0, 0, 8, 8), 3) == (True, True)
