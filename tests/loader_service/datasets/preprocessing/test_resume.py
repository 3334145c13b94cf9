"""The same command resumes an interrupted run and ends with the fingerprints of an undisturbed one."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from click.testing import Result

from loader_service.data.records import Records
from loader_service.data.writer import partials
from loader_service.datasets.preprocessing.build import COMMIT_BYTES
from loader_service.datasets.verify import verify

Preprocess = Callable[..., Result]

FEW_KILLS: Final = 4
MANY_KILLS: Final = int(os.environ.get("PREPROCESS_KILLS", "20"))
"""Number of times that a run is killed; more only take longer."""

KILLS_IN_A_ROW: Final = 4
"""Kills per folder; all but the first hit a run that resumes."""

FULL_BYTES: Final = 40_000_000
"""Size of a disk that holds half of the large album's raw records, and the workers' memory."""


class Undisturbed(NamedTuple):
    """The result and the duration of an undisturbed run on the large album."""

    fingerprints: tuple[str, str]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(large_album: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed")
    started_s = time.monotonic()
    subprocess.run(command(large_album, out), check=True, capture_output=True)
    return Undisturbed(fingerprints_of(out), time.monotonic() - started_s)


def command(source: Path, out: Path, *options: str) -> list[str]:
    """Return the command line of a separate process."""
    return [sys.executable, "-m", "tools.preprocess", str(source), str(out), "--codec=raw", "--workers=1", *options]


def fingerprints_of(out: Path) -> tuple[str, str]:
    """Return the fingerprints of both environments."""
    return verify(out / "train.lmdb"), verify(out / "val.lmdb")


@contextmanager
def full_disk(n_bytes: int = FULL_BYTES) -> Iterator[None]:
    """Limit the size of files of this process and its children to ``n_bytes``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for_records(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run has written its first commit."""
    deadline_s = time.monotonic() + 30
    while not any(path.stat().st_size > 1.5 * COMMIT_BYTES for path in out.glob(".train.lmdb.*.partial/data.mdb")):
        assert process.poll() is None, "it has ended before"
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.02)


@pytest.mark.parametrize("kills", [FEW_KILLS, pytest.param(MANY_KILLS, marks=pytest.mark.long)], ids=["few", "many"])
def test_kills_at_random_moments_change_nothing(
    kills: int, large_album: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """After SIGKILL at random moments, also while it resumes, the same command makes the same fingerprints."""
    moments = random.Random(20121203)
    for number in range(kills):
        out = tmp_path / str(number // KILLS_IN_A_ROW)
        with subprocess.Popen(command(large_album, out), stderr=subprocess.DEVNULL) as process:
            select.select([], [], [], moments.uniform(0, undisturbed.seconds * 0.75))
            process.kill()
    for out in sorted(tmp_path.iterdir()):
        subprocess.run(command(large_album, out), check=True, capture_output=True)
        assert fingerprints_of(out) == undisturbed.fingerprints
        assert sorted(path.name for path in out.iterdir()) == ["train.lmdb", "val.lmdb"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes(
    number: signal.Signals, code: int, large_album: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """A run that is stopped after its first commit says that it can be resumed, and the next run does only the rest."""
    with subprocess.Popen(command(large_album, tmp_path), stderr=subprocess.PIPE) as process:
        wait_for_records(tmp_path, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in said
    assert (b"the finished part is kept; run the same command to resume" in said) == (number != signal.SIGKILL)
    assert not (tmp_path / "train.lmdb").exists()
    again = subprocess.run(command(large_album, tmp_path), check=True, capture_output=True, text=True)
    assert "train: resuming after" in again.stderr
    assert fingerprints_of(tmp_path) == undisturbed.fingerprints


def test_a_full_disk_is_survived(
    large_album: Path, tmp_path: Path, undisturbed: Undisturbed, preprocess: Preprocess
) -> None:
    """A full disk gives a sentence; with free space again, the same command does the rest."""
    with full_disk():
        stopped = preprocess(large_album, tmp_path, "--codec=raw")
    assert stopped.exit_code == 3
    assert "records are kept, to resume from" in stopped.output
    assert "Traceback" not in stopped.output
    again = preprocess(large_album, tmp_path, "--codec=raw")
    assert again.exit_code == 0
    assert "train: resuming after" in again.output
    assert fingerprints_of(tmp_path) == undisturbed.fingerprints


def test_a_centered_run_resumes(large_album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A run that stops while writing raw or centered records resumes to the same fingerprints."""
    for limit in (40_000_000, 100_000_000):  # the raw records of training take 75 MB, the centred ones 150
        with full_disk(limit):
            assert preprocess(large_album, tmp_path / "again", "--codec=centered").exit_code == 3
    again = preprocess(large_album, tmp_path / "again", "--codec=centered")
    assert again.exit_code == 0
    assert "train.raw: resuming after" not in again.output
    assert preprocess(large_album, tmp_path / "once", "--codec=centered").exit_code == 0
    assert fingerprints_of(tmp_path / "again") == fingerprints_of(tmp_path / "once")


def test_other_options_remove_unfinished_records_only_with_replace(
    large_album: Path, tmp_path: Path, preprocess: Preprocess
) -> None:
    """Another command removes the records of an interrupted run only with --replace."""
    with full_disk():
        assert preprocess(large_album, tmp_path, "--codec=raw").exit_code == 3
    (partial,) = partials(tmp_path / "train.lmdb")
    other = preprocess(large_album, tmp_path, "--codec=jpeg")
    assert other.exit_code == 1
    assert "records of an interrupted run with another source or other options" in other.output
    assert partial.exists()
    assert preprocess(large_album, tmp_path, "--codec=jpeg", "--replace").exit_code == 0
    assert not partial.exists()
    with Records(tmp_path / "train.lmdb") as records:
        assert records.manifest.codec == "jpeg"
