"""The whole benchmark in a tiny run without peers, and the arithmetic of its targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from tools.bench import contest
from tools.bench.contest import Contestant, Kind, Running, Turn
from tools.bench.report.document import Results
from tools.bench.report.targets import ratio, targets
from tools.bench.turns import touch
from tools.errors import ToolFailed

ROOT = Path(__file__).parents[3]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of two photographs of noise."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (300, 280, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    return folder


def turn(rate: float, consumer: float = 0.0) -> Turn:
    """Return a turn with this rate; the consumer's CPU time is this share of one millisecond per image."""
    return Turn(images_per_s=rate, cpu_ms=1.0, consumer_cpu_ms=consumer, memory_mb=1.0)


def contestant(program: str) -> Contestant:
    """Return a contestant that runs a Python program."""
    return Contestant("other", "other", "raw", Kind.PEER, (sys.executable, "-c", program))


@pytest.mark.timeout(150)
def test_a_small_run_writes_its_results_and_document(tmp_path: Path, photographs: Path) -> None:
    """This project and every limit deliver images in every round, and document and chart have each of them."""
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "--peers",
        "none",
        "--rounds",
        "1",
        "--seconds",
        "0.05",
        "--no-single",
    ]
    command += ["--records", "256", "--workers", "1", "--photographs", str(photographs), "--build", str(tmp_path)]
    command += ["--document", str(tmp_path / "benchmarks.md")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=90)
    results = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Results)
    assert {each.kind for each in results.contestants} == {Kind.OURS, Kind.LIMIT}
    assert all(turns[0].images_per_s > 0 for turns in results.rounds.values())
    document = (tmp_path / "benchmarks.md").read_text()
    assert [each.title for each in results.contestants if each.title not in document] == []
    chart = ElementTree.parse(tmp_path / "benchmarks.svg")
    words = [text.text or "" for text in chart.iter("{http://www.w3.org/2000/svg}text")]
    for each in results.contestants:
        [turn] = results.rounds[each.name]
        assert each.title.replace("**", "") in words
        figures = (f"{turn.images_per_s:,.0f}", f"{turn.cpu_ms:.3f}", f"{turn.memory_mb:,.0f}")
        assert figures in list(zip(words, words[1:], words[2:], strict=False))
    assert "](benchmarks.svg)" in document


def test_an_unknown_peer_is_refused() -> None:
    """The error lists the peers that exist."""
    command = [sys.executable, "-m", "tools.bench", "--peers", "nobody"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "there is no peer 'nobody'; there are dataloader, dali" in done.stderr


def test_ratios_are_taken_within_a_round_and_against_the_best() -> None:
    """The result is the median of the rounds' ratios, not the ratio of medians."""
    rounds = {
        "a": [turn(10), turn(60), turn(30)],
        "b": [turn(10), turn(20), turn(5)],
        "c": [turn(1), turn(10), turn(10)],
    }
    found = ratio(rounds, "a", ("b", "c", "absent"))
    assert found is not None
    assert (found.least, found.median, found.most) == (1, 3, 3)
    assert ratio(rounds, "a", ("absent",)) is None


@pytest.mark.parametrize(("rate", "reached"), [(60.0, True), (59.0, False)])
def test_a_target_is_reached_at_its_figure(rate: float, reached: bool) -> None:
    """0.60 of the memcpy limit reaches the target, less does not; a target without figure is not reached."""
    found = targets({"ours-raw-shm": [turn(rate, 0.04)], "memcpy": [turn(100)]}, None)
    assert found[0].reached is reached
    assert [target.reached for target in found if target.figure is None] == [False] * 7
    assert found[-1].reached


def test_a_figure_above_its_bound_is_not_claimed() -> None:
    """A figure above a physical bound shows that the limit's turns were disturbed, so no target is claimed."""
    [target, *_] = targets({"ours-raw-shm": [turn(120)], "memcpy": [turn(100)]}, None)
    assert (target.disturbed, target.reached) == (True, False)


def test_decoding_less_than_all_may_exceed_decoding_all() -> None:
    """Decoding whole records with libjpeg-turbo is a limit to compare with, not a bound."""
    found = targets({"ours-jpeg-shm": [turn(120)], "decode": [turn(100)]}, None)
    assert [(target.disturbed, target.reached) for target in found if target.figure] == [(False, True)]


def test_a_contestant_that_fails_is_named_with_the_end_of_its_log() -> None:
    """The error has its exit code and the end of its log."""
    sentence = r"other ended with exit code 1: no such format"
    with Running(contestant("raise SystemExit('no such format')")) as broken, pytest.raises(ToolFailed, match=sentence):
        broken.wait()


def test_a_contestant_that_closes_its_output_and_lives_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end of file is reported like an early end, and leaving the block ends it."""
    monkeypatch.setattr(contest, "GONE_S", 0.2)
    program = "import os, time; os.write(2, b'no more'); os.close(1); time.sleep(60)"
    with (
        Running(contestant(program)) as running,
        pytest.raises(ToolFailed, match="closed its output and did not end: no more"),
    ):
        running.wait()


def test_leaving_ends_all_processes_of_a_contestant() -> None:
    """Processes that the contestant started end too."""
    program = "import subprocess, sys; subprocess.Popen(['cat'], stdin=subprocess.PIPE); print('ready', flush=True)"
    program += "; sys.stdin.read()"
    others = psutil.Process().children()  # of the session's fixtures
    with Running(contestant(program)) as running:
        running.wait()
        [child] = [process for process in psutil.Process().children() if process not in others]
        tree = [child, *child.children(recursive=True)]
        assert len(tree) == 2
    assert not any(process.is_running() for process in tree)


@pytest.mark.parametrize("images", [np.zeros((2, 256, 256, 3), np.uint8), np.zeros((2, 224, 224, 3), np.float32)])
def test_a_batch_of_another_form_does_not_count(images: np.ndarray) -> None:
    """Images of another size or dtype end the contestant: its figure would not be comparable."""
    with pytest.raises(SystemExit, match="a batch is"):
        touch(images)
