"""The contents of run folders, whole and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from trainer.errors import RunFolderError
from trainer.report.records import read_log, read_run, read_runs
from trainer.run.progress import StepRecord


def step(number: int, loss: float) -> StepRecord:
    return StepRecord(number, 0, 32 * number, loss, 0.5, 0.01, 100.0, 0.0)


def test_a_finished_run_is_read_whole(finished: Path) -> None:
    """Steps, epochs, times, ledger and checkpoint are there, and nothing is missing."""
    run = read_run(finished, "small")
    assert run.missing == []
    assert [record.step for record in run.log.steps] == [2, 4, 5, 6, 8, 10]
    assert [run.log.epoch_of(record) for record in run.log.steps][2::3] == [1.0, 2.0]
    assert run.log.seconds.keys() >= {"waiting", "forward", "validating"}
    assert [(account.expected, account.delivered) for account in run.ledger] == [(300, 300)] * 2
    assert run.checkpoint is not None
    assert run.checkpoint.plain.class_names == ("ant", "bee", "cat")


def test_a_log_with_a_torn_line_and_steps_made_again(tmp_path: Path) -> None:
    """The last version of a repeated step counts; damaged lines are counted and left out."""
    lines = [msgspec.json.encode(record) for record in (step(1, 2.0), step(2, 9.0), step(2, 1.0))]
    torn = [b'{"event":"start"}', b"\xff\xfe", b"[]", b'{"event":"epoch","epoch":"x"}', b'{"event":"st']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines, *torn]))
    log = read_log(tmp_path / "log.jsonl")
    assert [(record.step, record.loss) for record in log.steps] == [(1, 2.0), (2, 1.0)]
    assert (log.epochs, log.unreadable, log.epoch_size) == ([], 4, None)


def test_what_is_damaged_is_named(finished: Path, tmp_path: Path) -> None:
    """Half-written files and a damaged checkpoint are left out by name; the checkpoint before it is used."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").write_text('{"finished": tr')
    (run / "config.json").write_text('{"config": {"lr": 7}}')
    older, newest = sorted((run / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    read = read_run(run, "run")
    assert read.checkpoint_path == older
    assert read.ledger[0].delivered == 300
    assert [sentence.split()[0] for sentence in read.missing] == ["config.json", "summary.json", "step-000000010.pt:"]
    shutil.rmtree(run / "checkpoints")
    assert "There is no checkpoint" in read_run(run, "run").missing[-1]


def test_runs_of_one_name_are_told_apart(finished: Path, tmp_path: Path) -> None:
    """Equal names of folders are numbered; a folder without a run is an error."""
    shutil.copytree(finished, tmp_path / finished.name)
    names = [run.name for run in read_runs([finished, tmp_path / finished.name, finished])]
    assert names[0] == "small"
    assert len(set(names)) == 3
    with pytest.raises(RunFolderError, match="no run was started"):
        read_runs([tmp_path])
