"""Altered defaults, for the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loader_service import LocalNode, defaults
from tools.bench.altered import alter
from tools.errors import ToolFailed


def test_a_node_uses_the_changed_default(dataset_dir: Path) -> None:
    """The memory ceiling is that of one send slot per worker and the one extra slot."""
    program = (sys.executable, "-m", "tools.bench.altered", "SEND_SLOTS_PER_WORKER=1")
    with LocalNode(dataset_dir, workers=1, program=program) as node:
        line = node.announcement
    assert f"at most {2 * defaults.SEND_SLOT_BYTES // 2**20} MiB" in line


@pytest.mark.parametrize("change", ["WORKER_STALL_S=1", "PREFETCH=0", "PREFETCH", "PREFETCH=many"])
def test_an_unknown_change_is_refused(change: str) -> None:
    """An ignored change would make the benchmark compare a default with itself."""
    with pytest.raises(ToolFailed, match=f"'{change}' is not NAME=VALUE, with one of PREFETCH"):
        alter(change)
