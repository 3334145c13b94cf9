"""An exported environment can be preprocessed again to the same records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from loader_service.cli import main
from loader_service.data.codecs import Codec
from loader_service.data.image_file import load_picture
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.records import Records
from loader_service.data.writer import Writer
from loader_service.datasets.export import folder_names

COUNT = 7


def run(*arguments: Path | str) -> Result:
    """Run ``loader-service export``."""
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture(params=["raw", "jpeg"])
def environment(request: pytest.FixtureRequest, tmp_path: Path, make_dataset: Callable[..., Manifest]) -> Path:
    """Make a small environment of each codec."""
    codec: Codec = request.param
    make_dataset(tmp_path / "small.lmdb", COUNT, codec)
    return tmp_path / "small.lmdb"


def test_a_folder_holds_every_record(environment: Path, tmp_path: Path) -> None:
    """Each record becomes a file with its pixels in the folder of its class; a jpeg record keeps its bytes."""
    assert run(environment, tmp_path / "out").exit_code == 0
    with Records(environment) as records:
        for number in range(COUNT):
            label, pixels = records.pixels(number)
            (path,) = (tmp_path / "out" / records.manifest.class_names[label]).glob(f"{number:08d}.*")
            if path.suffix == ".jpg":
                with records.values() as values:
                    assert path.read_bytes() == bytes(values.read(number)[3])
            else:
                assert np.array_equal(load_picture(path), pixels)
    assert len(list((tmp_path / "out").rglob("*.*"))) == COUNT


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_an_export_can_be_preprocessed(form: str, tmp_path: Path, make_dataset: Callable[..., Manifest]) -> None:
    """Raw records that are exported and preprocessed keep labels and pixels, in both formats."""
    make_dataset(tmp_path / "a.lmdb", COUNT)
    assert run(tmp_path / "a.lmdb", tmp_path / "files", "--format", form).exit_code == 0
    options = ["--val-fraction", "0", "--workers", "1"]
    result = CliRunner().invoke(main, ["preprocess", str(tmp_path / "files"), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    with Records(tmp_path / "a.lmdb") as before, Records(tmp_path / "out" / "train.lmdb") as after:
        samples = [
            sorted((records.pixels(i)[0], records.pixels(i)[1].tobytes()) for i in range(COUNT))
            for records in (before, after)
        ]
    assert samples[0] == samples[1]


def test_nothing_is_overwritten(environment: Path, tmp_path: Path) -> None:
    """An existing folder is refused, and a missing environment leaves nothing behind."""
    result = run(environment, tmp_path)
    assert result.exit_code == 2
    assert "a folder that does not exist yet" in result.output
    assert run(tmp_path / "none.lmdb", tmp_path / "out").exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.lmdb"]


def test_class_names_cannot_lead_out_of_the_folder(tmp_path: Path, statistics: Statistics) -> None:
    """Class names of a hostile manifest do not lead out of OUT."""
    with Writer(tmp_path / "x.lmdb", codec="raw", class_names=("../../evil", "..")) as writer:
        for label in range(2):
            writer.put(label, bytes(256 * 256 * 3), "a")
        writer.finish(statistics, made_by={})
    assert run(tmp_path / "x.lmdb", tmp_path / "deep" / "out").exit_code == 0
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {"_.._.._evil", "_.."}
    assert {path.name for path in tmp_path.iterdir()} == {"x.lmdb", "deep"}


def test_folder_names_stay_apart() -> None:
    """Names that would become equal start with their label."""
    assert folder_names(("a", "b c")) == ["a", "b c"]
    assert folder_names(("a/b", "a_b")) == ["000000_a_b", "000001_a_b"]


def test_long_names_fit_a_file_system() -> None:
    """A folder's name has at most 200 bytes of UTF-8, however wide its characters are, and no character is split."""
    (name,) = folder_names(("犬" * 200,))
    assert name == "犬" * 66
