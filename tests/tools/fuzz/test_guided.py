"""Fuzzing guided by coverage: a short run, and proof that it finds a mistake that random damage does not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.errors import ToolFailed
from tools.fuzz import guided
from tools.fuzz.guided import KINDS, fuzz_guided
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


def test_a_planted_mistake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write beyond a buffer, at a comment that begins with a letter that no seed has, ends the run with the report."""
    if reason := guided.missing("jpegs"):
        pytest.skip(reason)
    mistake = """
    if (marker == 0xFE && end > p && p[0] == 'b')
        ((volatile uint8_t *)coded_bytes)[sizeof coded_bytes + p[0] % 2] = 0;
    if (marker == 0xE2)"""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in builds.SOURCES[0].parent.glob("_*.[ch]"):
        (folder / path.name).write_text(path.read_text().replace("\n    if (marker == 0xE2)", mistake))
    monkeypatch.setattr(builds, "SOURCES", tuple(folder / path.name for path in builds.SOURCES))
    with pytest.raises(ToolFailed, match="AddressSanitizer"):
        fuzz_guided("jpegs", 200_000, 1, tmp_path)
