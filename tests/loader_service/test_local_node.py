"""A private node is its starter's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader_service import LocalNode, status


def test_it_takes_nothing_from_outside(dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment and a file say is meant for the node that a user starts, and would break this one."""
    monkeypatch.setenv("LOADER_SERVICE_START_METRICS", "nonsense")
    monkeypatch.setenv("LOADER_SERVICE_CONFIG", "/nowhere.toml")
    monkeypatch.chdir(tmp_path)
    Path("loader-service.toml").write_text("[start]\nwrokers = 1\n", encoding="utf-8")
    with LocalNode(dataset_dir, workers=1) as node:
        assert len(status(node.address).workers) == 1
