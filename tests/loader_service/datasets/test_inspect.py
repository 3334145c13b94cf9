"""`inspect` shows the facts of an environment and draws images of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from loader_service.cli import main
from loader_service.data.records import Records
from loader_service.data.writer import Writer
from loader_service.datasets.inspect import histogram


def run(path: Path, *options: str) -> str:
    """Run ``loader-service inspect`` and return its stdout."""
    result = CliRunner().invoke(main, ["inspect", str(path), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_summary_has_the_manifests_facts(dataset_dir: Path) -> None:
    """The text and the JSON show counts, codec, classes and the fingerprint."""
    text = run(dataset_dir / "train.lmdb")
    facts = json.loads(run(dataset_dir / "train.lmdb", "--json"))
    with Records(dataset_dir / "train.lmdb") as records:
        manifest = records.manifest
    assert manifest.fingerprint in text
    assert facts["fingerprint"] == manifest.fingerprint
    assert "300 of 256 x 256 pixels, raw" in text
    assert facts["class_counts"] == {"ant": 100, "bee": 100, "cat": 100}
    assert facts["deviations"] == pytest.approx([np.sqrt(v) * 255 for v in manifest.eigenvalues])
    assert all(f"{name}      100 █" in text for name in ("ant", "bee", "cat"))


def test_the_pictures_show_what_they_say(
    dataset_dir: Path, tmp_path: Path, picture: Callable[[int], np.ndarray]
) -> None:
    """--pictures writes contact sheets of records and samples, the mean image and the colour directions as PNG."""
    run(dataset_dir / "train.lmdb", "--pictures", str(tmp_path / "pictures"))
    sheets = {}
    for path in (tmp_path / "pictures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            sheets[path.name] = np.asarray(image)
    assert sheets.keys() == {"records.png", "samples.png", "mean.png", "colours.png"}
    shrunk = np.asarray(Image.fromarray(picture(1)).resize((128, 128), Image.Resampling.BICUBIC))
    assert np.array_equal(sheets["records.png"][:128, 130:258], shrunk)
    assert np.array_equal(sheets["samples.png"][142:270, :128], shrunk)
    with Records(dataset_dir / "train.lmdb") as records:
        assert np.abs(sheets["mean.png"] - records.statistics.mean_image).max() <= 0.5
    first = np.asarray(Image.fromarray(picture(0)).resize((128, 128), Image.Resampling.BICUBIC))
    assert np.array_equal(sheets["colours.png"][:128, 260:388], first)  # the middle step is none at all
    assert sheets["colours.png"][:128, :128].mean() < first.mean() < sheets["colours.png"][:128, 520:648].mean()


def test_many_classes_are_shown_by_their_ends() -> None:
    """A histogram of a thousand classes shows the ten smallest and the ten largest."""
    lines = histogram({f"n{number:03d}": number for number in range(1000)})
    assert len(lines) == 21
    assert "n000        0 " in lines[0]
    assert lines[10] == "  ..."
    assert lines[-1].endswith("█" * 40)


def test_a_small_environment_of_odd_names_is_shown(
    tmp_path: Path, statistics: object, picture: Callable[[int], np.ndarray]
) -> None:
    """One record and a class name beyond ASCII are enough for all images."""
    with Writer(tmp_path / "x.lmdb", codec="raw", class_names=("Füchse 🦊",)) as writer:
        writer.put(0, picture(0).tobytes(), "a")
        writer.finish(statistics, made_by={})  # type: ignore[arg-type]
    assert "Füchse 🦊" in run(tmp_path / "x.lmdb", "--pictures", str(tmp_path / "pictures"))
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_a_folder_without_an_environment_is_refused(tmp_path: Path) -> None:
    """A folder without an environment gives an error and exit code 3."""
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 3
    assert "there is no dataset at" in result.stderr
