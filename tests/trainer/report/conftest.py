"""Fixtures of the report's tests: a short run on the node of the trainer's tests, and a reader of drawn documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from trainer.cli import main
from trainer.report.records import RunRecord, read_run

SMALL = [
    "--width",
    "0.05",
    "--epochs",
    "2",
    "--batch-size",
    "64",
    "--devices",
    "cpu",
    "--log-every",
    "2",
    "--crop",
    "64",
]


@pytest.fixture(scope="session")
def finished(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the folder of a finished run of two epochs, for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    options = ["--schedule", "step", "--drop-at", "1", "--ema", "0.9"]
    done = CliRunner().invoke(main, ["run", "--loader", node, "--run", str(folder), *SMALL, *options])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def record(finished: Path) -> RunRecord:
    """Provide the finished run as the report reads it."""
    return read_run(finished, "small")


@pytest.fixture(scope="session")
def words() -> Callable[[str], list[str]]:
    """Provide ``words(svg)``: the texts in an SVG document, in order; it must be well formed."""

    def found(document: str) -> list[str]:
        texts = ElementTree.fromstring(document).iter("{http://www.w3.org/2000/svg}text")
        return ["".join(text.itertext()) for text in texts]

    return found
