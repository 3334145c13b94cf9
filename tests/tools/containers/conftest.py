"""A Docker that only writes down what it is asked to do: what `make docker` does with a real one is tested by doing it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """\
#!{python}
import json, pathlib, sys
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
with open(folder / "asked", "a") as asked:
    asked.write(json.dumps(words) + "\\n")
for part, printed, code in json.loads((folder / "answers").read_text()):
    if part in " ".join(words):
        if "cp" in words:  # a run's folder, out of its volume
            pathlib.Path(words[-1]).mkdir(parents=True)
            sys.stdout = open(pathlib.Path(words[-1], "summary.json"), "w")
        sys.stdout.write(printed)
        sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the program `docker` that is found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "answers").write_text("[]", encoding="utf-8")
    (folder / "docker").write_text(PROGRAM.format(python=sys.executable, folder=str(folder)), encoding="utf-8")
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def answer(folder: Path) -> Callable[..., None]:
    """Let commands with ``part`` in their arguments print something and end with a code; what was said last counts."""
    answers: list[tuple[str, str, int]] = []

    def say(part: str, printed: str = "", code: int = 0) -> None:
        answers.insert(0, (part, printed, code))
        (folder / "answers").write_text(json.dumps(answers), encoding="utf-8")

    return say


@pytest.fixture
def asked(folder: Path) -> Callable[[], list[list[str]]]:
    """The arguments of every command so far."""
    return lambda: [json.loads(line) for line in (folder / "asked").read_text(encoding="utf-8").splitlines()]
