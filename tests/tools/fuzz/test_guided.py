"""Fuzzing guided by coverage: a short run, and proof that a mistake in the decoder ends it with a report."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tools.errors import ToolFailed
from tools.fuzz import guided
from tools.fuzz.guided import KINDS, fuzz_guided
from tools.fuzz.jpegs import SHAPES
from tools.fuzz.segments import COM, files, segment, split
from tools.sanitize import builds

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(guided.missing("messages")), reason=guided.missing("messages")),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_run_reaches_more_than_its_seeds(kind: str, tmp_path: Path) -> None:
    """libFuzzer keeps inputs beyond the seeds, because they reach new places."""
    if reason := guided.missing(kind):
        pytest.skip(reason)
    kept, reached = fuzz_guided(kind, 3000, 1, tmp_path)
    assert kept > len(guided.seeds(kind))
    assert reached > 10


def test_a_planted_mistake_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write beyond a buffer ends the run with the sanitizer's report, and the input is kept."""
    if reason := guided.missing("jpegs"):
        pytest.skip(reason)
    mistake = """
    if (marker == 0xFE && end - p > 2 && memcmp(p, "bug", 3) == 0)
        ((volatile uint8_t *)coded_bytes)[sizeof coded_bytes + p[2] % 2] = 0;
    if (marker == 0xE2)"""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in builds.SOURCES[0].parent.glob("_*.[ch]"):
        (folder / path.name).write_text(path.read_text().replace("\n    if (marker == 0xE2)", mistake))
    monkeypatch.setattr(builds, "SOURCES", tuple(folder / path.name for path in builds.SOURCES))
    first, *rest = split(files(Random(3), SHAPES[0])[0])
    monkeypatch.setattr(guided, "seeds", lambda _: [b"\0" + b"".join((first, segment(COM, b"bug!"), *rest))])
    with pytest.raises(ToolFailed, match="global-buffer-overflow"):
        fuzz_guided("jpegs", 100, 1, tmp_path)
    assert len(list(tmp_path.glob("jpegs-crash-*"))) == 1
