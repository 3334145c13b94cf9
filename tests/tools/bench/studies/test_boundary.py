"""The study of the time between two epochs."""

from __future__ import annotations

from pathlib import Path

from tools.bench.studies.boundary import measure


def test_each_boundary_is_measured(dataset_dir: Path) -> None:
    """Three epochs of three batches have two boundaries, and two calls inside of each."""
    found = measure(dataset_dir, workers=1, epochs=2)
    assert (len(found.between_ms), len(found.within_ms)) == (2, 6)
    assert "from an epoch's last batch to the next one's first:" in str(found)
