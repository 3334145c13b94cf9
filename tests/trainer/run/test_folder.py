"""Run folders: new ones are created, existing ones are found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import RunConfig
from trainer.errors import RunFolderError
from trainer.run.folder import RunFolder, find_checkpoint, newest_run


def test_a_new_folder_tells_how_it_was_made(tmp_path: Path) -> None:
    """config.json has configuration, machine, commit, and the versions of all libraries."""
    folder = RunFolder.create(tmp_path / "run", tmp_path)
    assert not folder.has_run
    folder.describe(RunConfig(seed=4))
    assert folder.has_run
    about = json.loads(folder.config.read_text())
    assert about["config"]["seed"] == 4
    assert about["versions"] | {"torch": torch.__version__, "numpy": np.__version__} == about["versions"]
    assert {"loader-service", "lmdb", "pyzmq", "simplejpeg", "sympy"} <= about["versions"].keys()
    assert about["machine"]["cpus"] == os.cpu_count()
    assert "commit" in about


def test_named_folders_never_collide(tmp_path: Path) -> None:
    """Runs started in the same second get different folders."""
    made = {RunFolder.create(None, tmp_path / "runs").path for _ in range(3)}
    assert len(made) == 3


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    """A folder that is not empty is refused."""
    (tmp_path / "precious").touch()
    with pytest.raises(RunFolderError, match="it is not empty"):
        RunFolder.create(tmp_path, tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """A file in the way is an error."""
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="it cannot be created"):
        RunFolder.create(tmp_path / "file" / "run", tmp_path)


def test_the_newest_run_is_the_one_with_a_checkpoint(tmp_path: Path) -> None:
    """A newer run without a checkpoint is skipped."""
    assert newest_run(tmp_path) is None
    with_checkpoint = RunFolder.create(tmp_path / "a", tmp_path)
    with_checkpoint.describe(RunConfig())
    with_checkpoint.checkpoints.mkdir()
    (with_checkpoint.checkpoints / "step-000000001.pt").touch()
    RunFolder.create(tmp_path / "b", tmp_path).describe(RunConfig())
    assert newest_run(tmp_path) == with_checkpoint.path


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    """A folder gives its checkpoint of the highest step, or an error without one; a file gives itself."""
    folder = RunFolder.create(tmp_path / "run", tmp_path)
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        find_checkpoint(folder.path)
    folder.checkpoints.mkdir()
    for step in (9, 10, 100):
        (folder.checkpoints / f"step-{step:09d}.pt").touch()
    assert find_checkpoint(folder.path).name == "step-000000100.pt"
    assert find_checkpoint(Path("some.pt")) == Path("some.pt")
    with pytest.raises(RunFolderError, match=r"it has no best\.pt yet"):
        find_checkpoint(folder.path, best=True)
    (folder.checkpoints / "best.pt").touch()
    assert find_checkpoint(folder.path, best=True).name == "best.pt"
