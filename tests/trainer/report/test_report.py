"""`trainer report`: whole runs, several runs, and runs of which parts are missing."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

from click.testing import CliRunner, Result

from trainer.cli import main

FIGURES = {"curves", "guesses", "neighbours", "kernels", "confusion", "augmentation", "network", "time", "ledger"}
OF_DATA = {"guesses", "neighbours", "confusion", "augmentation"}


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        main, ["report", *map(str, arguments), "--devices", "cpu", "--images", "40", "--batch-size", "32"]
    )


def figures(folder: Path) -> set[str]:
    """Return the names of the figures in a folder, each of which has all its forms."""
    names = {path.stem for path in folder.glob("*.svg")}
    for name in names:
        assert {path.suffix for path in folder.glob(f"{name}.*")} >= {".svg", ".png", ".json"}
    return names


def page(folder: Path) -> str:
    return unescape((folder / "report.html").read_text())


def test_a_report_has_every_figure(node: str, finished: Path, tmp_path: Path) -> None:
    """The page is one file with all figures in it, and each figure is a file in three forms; nothing is left out."""
    done = report(finished, "--loader", node, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Left out" not in done.output
    assert f"Wrote {tmp_path}/report.html, and 27 files beside it." in done.output
    assert figures(tmp_path) == FIGURES
    document = page(tmp_path)
    assert set(re.findall(r'<section id="(\w+)"', document)) == FIGURES
    assert "40 of 60 validation images" in document
    assert "40 of 300 training pictures were compared" in document
    confusion = json.loads((tmp_path / "confusion.json").read_bytes())
    assert sum(map(sum, confusion["confusion"])) == 40
    neighbours = json.loads((tmp_path / "neighbours.json").read_bytes())
    for query in neighbours:
        distances = [each["distance"] for each in query["nearest"]]
        assert distances == sorted(distances)


def test_two_runs_stand_side_by_side(finished: Path, tmp_path: Path) -> None:
    """Curves and times share a chart; all other figures are there for each run, under its name."""
    shutil.copytree(finished, tmp_path / "an other")
    done = report(finished, tmp_path / "an other", "--data", tmp_path / "gone", "--out", tmp_path / "both")
    assert done.exit_code == 0, done.output
    own = FIGURES - OF_DATA - {"curves", "time"}
    names = {f"{run}-{name}" for run in ("small", "an_other") for name in own}
    assert figures(tmp_path / "both") == names | {"curves", "time"}
    assert page(tmp_path / "both").count("<h3>an other</h3>") == len(own)


def test_a_run_without_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Figures of log and summary are there, by default in the run's folder; the page says which others are left out, and why."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"event":"ste')
    done = report(run)
    assert done.exit_code == 0, done.output
    assert figures(run / "report") == {"curves", "time", "ledger"}
    for sentence in ("There is no checkpoint", "1 lines of log.jsonl are damaged"):
        assert sentence in page(run / "report")
        assert f"Left out: {sentence}" in done.output


def test_a_dataset_that_is_gone(finished: Path, tmp_path: Path) -> None:
    """Without the images the network and its kernels are still drawn."""
    done = report(finished, "--data", tmp_path / "gone", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert figures(tmp_path / "out") == FIGURES - OF_DATA
    assert "The images cannot be read" in page(tmp_path / "out")


def test_another_dataset_is_not_taken_for_the_runs_own(finished: Path, tmp_path: Path, make_dataset: object) -> None:
    """A node that serves other images than the run's shows none of them."""
    assert callable(make_dataset)
    make_dataset(tmp_path / "data" / "train.lmdb", 40)
    done = report(finished, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert figures(tmp_path / "out") == FIGURES - OF_DATA
    assert "another dataset than the one" in page(tmp_path / "out")


def test_a_run_that_was_just_started(tmp_path: Path) -> None:
    """A run without any log line has nothing to show, which is an error in one sentence."""
    (tmp_path / "log.jsonl").write_text('{"event":"start"}\n')
    done = report(tmp_path)
    assert done.exit_code == 3
    assert "has nothing that can be shown" in done.output
    assert report(tmp_path / "nothing").exit_code == 3


def test_a_folder_that_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    """A file in the place of the folder is an error that names it."""
    (tmp_path / "taken").write_text("")
    done = report(finished, "--out", tmp_path / "taken" / "out")
    assert done.exit_code == 3
    assert "taken/out cannot be created" in done.output
