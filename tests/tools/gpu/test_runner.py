"""Limits: a piece that hangs, dies or takes too long loses only itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tools.gpu.command import settings_of
from tools.gpu.parts import Name, Part, Settings
from tools.gpu.probe import Probe
from tools.gpu.results import Agreement, Outcome, Rate, Results, Status, load
from tools.gpu.runner import Runner, best_form

WORKER = """
import json, os, signal, sys, time
for piece in sys.argv[3:]:
    print(json.dumps({"piece": piece}), flush=True)
    print("a library's own words", flush=True)
    if piece == "hangs":
        signal.pause()
    if piece == "dies":
        sys.stderr.write("CUDA error: an illegal memory access\\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    row = {"type": "Rate", "name": piece, "batch": 128, "images_per_s": [1.0]}
    print(json.dumps({"piece": piece, "row": row}), flush=True)
    if piece == "hangs after a figure":
        signal.pause()
    print(json.dumps({"piece": piece, "status": "done"}), flush=True)
    if piece == "breaks the GPU":
        sys.exit(0)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The settings of a GPU machine."""
    found = Probe("2.11.0", "13.0", ("NVIDIA H100",), 80.0, "")
    return settings_of(found, False, 1.0, tmp_path, None, None)


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """The command of a worker whose pieces do what their names say."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return [sys.executable, str(path)]


def part(*pieces: str, limit_s: float = 30.0, piece_s: float = 30.0, name: Name = Name.SPEED) -> Part:
    """Return a part with these pieces and limits."""
    return Part(name, "A part", limit_s, piece_s, list(pieces))


def status(results: Results, piece: str) -> tuple[Status, str]:
    """Return how a piece of the speed part ended."""
    outcome = results.outcomes[f"speed/{piece}"]
    return outcome.status, outcome.reason


def test_a_piece_that_dies_or_hangs_loses_only_itself(settings: Settings, program: list[str], tmp_path: Path) -> None:
    """Reasons are kept, later pieces are done, a figure that came before is kept, and all of it is on disk."""
    results, path = Results(), tmp_path / "results.json"
    pieces = ("a", "dies", "hangs", "hangs after a figure", "breaks the GPU", "b")
    on_disk: list[bool] = []  # at each piece's end: a SIGKILL then loses nothing

    def changed() -> None:
        on_disk.append(load(path) == results)

    Runner(settings, results, path, None, changed, program).run([part(*pieces, piece_s=0.5)])
    assert on_disk == [True] * len(pieces)
    assert status(results, "a") == status(results, "b") == status(results, "breaks the GPU") == (Status.DONE, "")
    died, why = status(results, "dies")
    assert died is Status.FAILED
    assert why == "the process ended with code -9: CUDA error: an illegal memory access"
    assert status(results, "hangs")[0] is Status.TIMED_OUT
    assert status(results, "hangs after a figure")[0] is Status.TIMED_OUT
    assert [row.name for row in results.of(Name.SPEED, Rate)] == ["a", "hangs after a figure", "breaks the GPU", "b"]
    assert load(path) == results


def test_a_part_at_its_limit_gives_way_to_the_next(settings: Settings, program: list[str], tmp_path: Path) -> None:
    """The piece under way stays to be done, after parts that have not been tried."""
    results = Results()
    slow, quick = part("hangs", "a", limit_s=0.5), part("b", name=Name.FEED)
    runner = Runner(settings, results, tmp_path / "results.json", None, lambda: None, program)
    runner.run([slow, quick])
    assert set(results.outcomes) == {"feed/b"}
    assert runner.left([slow, quick]) == ["speed/hangs", "speed/a"]
    assert results.attempts == {"speed": 1, "feed": 1}


def test_the_time_of_the_command_ends_the_part_under_way(
    settings: Settings, program: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not count as an attempt: the next call begins with it."""
    results = Results()
    runner = Runner(settings, results, tmp_path / "results.json", time.monotonic() + 0.5, lambda: None, program)
    runner.run([part("a", "hangs"), part("b", name=Name.FEED)])
    assert set(results.outcomes) == {"speed/a"}
    assert results.attempts == {}
    assert "the next call continues from here" in capsys.readouterr().err


def test_what_failed_is_tried_again_last(settings: Settings, program: list[str], tmp_path: Path) -> None:
    """The next call does pieces that never ran before those that failed, and leaves out what is done."""
    results = Results(outcomes={"speed/a": Outcome(Status.FAILED, "", 1), "speed/b": Outcome(Status.DONE, "", 1)})
    Runner(settings, results, tmp_path / "results.json", None, lambda: None, program).run([part("a", "b", "c")])
    assert [row.name for row in results.of(Name.SPEED, Rate)] == ["c", "a"]


def test_the_fastest_form_that_agrees_feeds_and_trains(settings: Settings) -> None:
    """A form whose gradients differ is left out, however fast."""
    results = Results()
    assert best_form(results, settings) == "bf16"
    for form, rate in (("bf16, graphs", 3.0), ("bf16, fused LRN", 2.0), ("bf16", 1.0)):
        results.put("speed/batch 128", Rate(form, title=form, batch=128, images_per_s=[rate]))
    assert best_form(results, settings) == "bf16, graphs"
    results.put("agreement/x", Agreement("x", form="bf16, graphs", agrees=False))
    assert best_form(results, settings) == "bf16, fused LRN"
