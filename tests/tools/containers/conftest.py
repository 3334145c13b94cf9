"""A fake Docker that records its commands; `make docker` is the test with a real one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loader_service.wire.messages import ClientStatus, Status, WorkerStatus

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
    """The folder of the fake program `docker`, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "answers").write_text("[]", encoding="utf-8")
    (folder / "docker").write_text(PROGRAM.format(python=sys.executable, folder=str(folder)), encoding="utf-8")
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def answer(folder: Path) -> Callable[..., None]:
    """Let commands with ``part`` in their arguments print something and end with a code; the last answer set wins."""
    answers: list[tuple[str, str, int]] = []

    def say(part: str, printed: str = "", code: int = 0) -> None:
        answers.insert(0, (part, printed, code))
        (folder / "answers").write_text(json.dumps(answers), encoding="utf-8")

    return say


@pytest.fixture
def asked(folder: Path) -> Callable[[], list[list[str]]]:
    """The arguments of every command so far."""
    return lambda: [json.loads(line) for line in (folder / "asked").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def status_json() -> Callable[[list[str], list[int]], str]:
    """``status_json(transports, samples)``: the command's output, with a client per transport and a worker per number."""

    def make(transports: list[str], samples: list[int]) -> str:
        workers = tuple(WorkerStatus(1, "idle", 1, made, 0.0) for made in samples)
        clients = tuple(ClientStatus("host:1", transport, 0, 1, 1) for transport in transports)
        status = Status(5, "0" * 32, "0.1.0", "tcp://*:5555", 1.0, 0, {}, workers, clients, 0, 0, 0, 0)
        return json.dumps({**msgspec.to_builtins(status), "rates": {"samples_per_s": 1.0}})

    return make
