"""The command makes environments from image folders, and survives every kind of failure."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from loader_service.cli import main
from loader_service.data.codecs import encode
from loader_service.data.image_file import load_picture
from loader_service.data.records import Records
from loader_service.datasets.verify import verify

Preprocess = Callable[..., Result]


@pytest.fixture(scope="module")
def fingerprints(album: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the fingerprints of an undisturbed run with one worker on the album."""
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(album, out), check=True, capture_output=True)
    return fingerprints_of(out)


def fingerprints_of(out: Path) -> tuple[str, str]:
    """Return the fingerprints of both environments."""
    return verify(out / "train.lmdb"), verify(out / "val.lmdb")


def command(source: Path, out: Path, workers: int = 1) -> list[str]:
    """Return the command line of a separate process."""
    return [sys.executable, "-m", "tools.preprocess", str(source), str(out), "--workers", str(workers)]


def test_every_picture_becomes_a_record(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """Each image becomes one record with its label and pixels, and the order mixes the classes."""
    assert preprocess(album, tmp_path, "--codec", "raw").exit_code == 0
    with Records(tmp_path / "train.lmdb") as records:
        sources = [records.source(number) for number in range(len(records))]
        labels = []
        for number, source in enumerate(sources):
            label, pixels = records.pixels(number)
            labels.append(label)
            assert records.manifest.class_names[label] == source.split("/")[0]
            assert np.array_equal(pixels, load_picture(album / "train" / source))
    assert sorted(sources) == sorted(f"{name}/{i:03d}.jpg" for name in ("ant", "bee", "cat") for i in range(26))
    assert all(len(set(labels[i : i + 26])) == 3 for i in range(0, 78, 26))


def test_jpeg_records_decode_to_what_the_statistics_are_of(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """The statistics of jpeg records are those of the decoded pixels, and --quality is used."""
    assert preprocess(album, tmp_path, "--codec", "jpeg", "--quality", "80").exit_code == 0
    with Records(tmp_path / "train.lmdb") as records:
        batch = np.stack([records.pixels(number)[1] for number in range(len(records))])
        manifest = records.manifest
        with records.values() as values:
            payload = bytes(values.read(5)[3])
        picture = load_picture(album / "train" / records.source(5))
    assert manifest.codec_parameters["quality"] == 80
    assert payload == encode(picture, "jpeg", manifest.codec_parameters)
    np.testing.assert_array_equal(manifest.statistics.mean_image, batch.mean(axis=0).astype(np.float32))
    covariance = np.cov(batch.reshape(-1, 3).T / 255.0, bias=True)
    np.testing.assert_allclose(manifest.statistics.covariance, covariance, rtol=1e-9)


def test_centred_records_hold_the_same_pixels(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--codec centered is lossless, keeps the facts of both splits, and leaves no raw records behind."""
    assert preprocess(album, tmp_path / "raw", "--codec", "raw").exit_code == 0
    for time in ("first", "second"):
        result = preprocess(album, tmp_path / "centred", "--codec", "centered")
        assert result.exit_code == 0
        assert ("up to date" in result.output) == (time == "second")
    assert sorted(path.name for path in (tmp_path / "centred").iterdir()) == [
        "rejected.jsonl",
        "train.lmdb",
        "val.lmdb",
    ]
    for split in ("train.lmdb", "val.lmdb"):
        verify(tmp_path / "centred" / split)
        with Records(tmp_path / "raw" / split) as raw, Records(tmp_path / "centred" / split) as centred:
            assert centred.manifest.codec == "centered"
            assert centred.manifest.mean_image == raw.manifest.mean_image
            assert centred.manifest.rejected == raw.manifest.rejected
            for number in range(len(raw)):
                assert centred.source(number) == raw.source(number)
                assert np.array_equal(centred.pixels(number)[1], raw.pixels(number)[1])


def test_a_bad_file_is_skipped_and_named(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """Files that are not images are shown, and listed with the reason in the manifest."""
    result = preprocess(album, tmp_path)
    with Records(tmp_path / "train.lmdb") as records:
        rejected = {bad.source: bad.reason for bad in records.manifest.rejected}
    assert rejected == {f"{name}/notes.txt": "it is in no known image format" for name in ("ant", "bee", "cat")}
    assert "rejected bee/notes.txt: it is in no known image format" in result.output
    assert "3 files rejected" in result.output
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == rejected
    assert {line["split"] for line in lines} == {"train"}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(
    workers: int, album: Path, tmp_path: Path, fingerprints: tuple[str, str], preprocess: Preprocess
) -> None:
    """The fingerprints of records and statistics are the same for any number of workers."""
    assert preprocess(album, tmp_path, "--workers", str(workers)).exit_code == 0
    assert fingerprints_of(tmp_path) == fingerprints


@pytest.mark.parametrize("codec", ["raw", "jpeg", "centered"])
def test_another_size(codec: str, album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--size sets the side of the records for any codec; verify, inspect and export accept them."""
    assert preprocess(album, tmp_path / "out", "--size", "99", "--codec", codec).exit_code == 0
    path = tmp_path / "out" / "train.lmdb"
    with Records(path) as records:
        assert records.side == 99
        assert records.statistics.mean_image.shape == (99, 99, 3)
        if codec != "jpeg":
            expected = load_picture(album / "train" / records.source(7), side=99)
            assert np.array_equal(records.pixels(7)[1], expected)
    for command, options in (("verify", ()), ("inspect", ("--pictures", str(tmp_path / "sheets")))):
        result = CliRunner().invoke(main, [command, str(path), *options])
        assert result.exit_code == 0, result.output
    assert "78 of 99 x 99 pixels" in result.output
    assert CliRunner().invoke(main, ["export", str(path), str(tmp_path / "back")]).exit_code == 0
    for file in (tmp_path / "back").rglob("*.*"):
        with Image.open(file) as picture:
            assert picture.size == (99, 99)


def test_validation_takes_the_statistics_of_training(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """The validation environment has the statistics and labels of the training split."""
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "1.jpg").write_bytes((album / "val" / "cat" / "001.jpg").read_bytes())
    out = tmp_path / "out"
    assert preprocess(album, out, "--val", str(tmp_path / "val")).exit_code == 0
    with Records(out / "train.lmdb") as train, Records(out / "val.lmdb") as val:
        assert val.manifest.mean_image == train.manifest.mean_image
        assert val.manifest.eigenvectors == train.manifest.eigenvectors
        assert val.manifest.class_names == train.manifest.class_names == ("ant", "bee", "cat")
        assert val.manifest.class_counts == (0, 0, 1)
        assert val.pixels(0)[0] == 2


def test_a_share_of_each_class_is_split_off(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """Without a validation folder, a tenth of each class or the given fraction is validation, and no image is in both."""
    for share, count in (((), 3), (("--val-fraction", "0.25"), 7)):
        out = tmp_path / str(count)
        assert preprocess(album / "train", out, *share).exit_code == 0
        with Records(out / "train.lmdb") as train, Records(out / "val.lmdb") as val:
            sources = [[split.source(i) for i in range(len(split))] for split in (train, val)]
            rejected = [bad.source for split in (train, val) for bad in split.manifest.rejected]
        taken = Counter(source.split("/")[0] for source in [*sources[1], *rejected])
        assert len({*sources[0], *sources[1], *rejected}) == 81
        assert all(count <= taken[name] <= count + 1 for name in ("ant", "bee", "cat"))


def test_no_validation_when_none_is_wanted(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A fraction of 0 makes the training environment only, even if there is a validation folder."""
    assert preprocess(album, tmp_path, "--val-fraction", "0").exit_code == 0
    assert environments(tmp_path) == ["train.lmdb"]


def test_a_second_run_does_no_work(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """The same command again does no work."""
    preprocess(album, tmp_path)
    before = (tmp_path / "train.lmdb" / "data.mdb").stat()
    unchanged = ("st_ino", "st_size", "st_mtime_ns")
    result = preprocess(album, tmp_path, "--workers", "2")
    assert result.exit_code == 0
    assert "up to date" in result.output
    after = (tmp_path / "train.lmdb" / "data.mdb").stat()
    assert [getattr(after, name) for name in unchanged] == [getattr(before, name) for name in unchanged]


def test_another_dataset_is_replaced_only_when_asked(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A dataset made from other input is refused, or replaced with --replace while readers keep the old one."""
    preprocess(album, tmp_path, "--seed", "1")
    result = preprocess(album, tmp_path)
    assert result.exit_code == 1
    assert "was made from other input or options: name another folder, or use --replace" in result.output
    with Records(tmp_path / "train.lmdb") as reader:
        old = reader.source(0)
        assert preprocess(album, tmp_path, "--replace").exit_code == 0
        assert reader.source(0) == old
        reader.check(len(reader) - 1)
    with Records(tmp_path / "train.lmdb") as reader:
        assert reader.manifest.made_by["seed"] == "0"
    assert environments(tmp_path) == ["train.lmdb", "val.lmdb"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_dataset_that_was_only_moved_aside_comes_back(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A run that was killed while it replaced a dataset does not lose the old one."""
    preprocess(album, tmp_path)
    (tmp_path / "train.lmdb").rename(tmp_path / ".train.lmdb.01234567.old")
    (tmp_path / ".val.lmdb.01234567.partial").mkdir()
    assert "up to date" in preprocess(album, tmp_path).output
    assert environments(tmp_path) == ["train.lmdb", "val.lmdb"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_dry_run_makes_nothing(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--dry-run shows the plan and does nothing."""
    result = preprocess(album, tmp_path, "--dry-run")
    assert result.exit_code == 0
    assert "81 files of 3 classes for training, 15 for validation" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_summary_for_programs(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--json prints one JSON object, even if the dataset is up to date."""
    first, second = (preprocess(album, tmp_path, "--json") for _ in range(2))
    assert json.loads(first.stdout) == json.loads(second.stdout)
    train, val = (json.loads(first.stdout)[split] for split in ("train", "val"))
    assert (train["records"], train["rejected"], train["classes"]) == (78, 3, 3)
    assert (train["fingerprint"], val["fingerprint"]) == fingerprints_of(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A file in the place of the output folder gives a sentence."""
    (tmp_path / "file").write_bytes(b"")
    result = preprocess(album, tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_a_hopeless_run_is_stopped(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A run with too many bad files, or with only bad files, stops with a sentence and leaves nothing."""
    junk = tmp_path / "junk" / "ant"
    junk.mkdir(parents=True)
    for number in range(150):
        (junk / f"{number}.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = preprocess(tmp_path / "junk", out, "--val-fraction", "0")
    assert result.exit_code == 1
    assert "is this the right folder?" in result.output
    for path in sorted(junk.iterdir())[:140]:
        path.unlink()
    result = preprocess(tmp_path / "junk", out, "--val-fraction", "0")
    assert result.exit_code == 3
    assert "none of 10 files became a record" in result.output
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("{album}/nowhere", "{tmp}/out"), 2, "does not exist"),
        (("{tmp}/zoo/yak", "{tmp}/out"), 3, "it holds no files in folders for classes"),
        (("{album}/train", "{album}/train/out"), 2, "not inside of"),
        (("{album}", "{tmp}/out", "--val", "{album}/train", "--val-fraction", "0.5"), 2, "no --val with it"),
        (("{album}", "{tmp}/out", "--val", "{tmp}/zoo"), 3, "its class 'yak' is not among the 3 classes"),
        (("{album}", "{tmp}/out", "--codec", "png"), 2, "is not one of"),
    ],
)
def test_wrong_arguments_give_one_sentence(
    arguments: tuple[str, ...], code: int, sentence: str, album: Path, tmp_path: Path, preprocess: Preprocess
) -> None:
    """Wrong folders and options give an exit code and a sentence without a traceback."""
    (tmp_path / "zoo" / "yak").mkdir(parents=True)
    (tmp_path / "zoo" / "yak" / "1.jpg").write_bytes(b"")
    result = preprocess(*(argument.format(album=album, tmp=tmp_path) for argument in arguments))
    assert result.exit_code == code
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_two_runs_keep_apart(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A second run that writes to the same folder is refused."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    result = preprocess(album, tmp_path)
    os.close(descriptor)
    assert result.exit_code == 1
    assert "another run is writing to" in result.output


def start(source: Path, out: Path, workers: int = 2) -> subprocess.Popen[str]:
    """Start the command, and return when its work has started."""
    process = subprocess.Popen(command(source, out, workers), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "files of 3 classes" in process.stderr.readline()
    return process


def environments(out: Path) -> list[str]:
    """Return the visible environments of a folder."""
    return sorted(path.name for path in out.iterdir() if re.fullmatch(r"\w+\.lmdb", path.name))


@pytest.mark.parametrize("delay_s", [0.05, 0.3, 0.6, 0.9])
def test_a_killed_run_leaves_no_half_environment(
    delay_s: float, album: Path, tmp_path: Path, fingerprints: tuple[str, str]
) -> None:
    """After SIGKILL at any moment, an environment with its final name is complete, and the next run makes the rest."""
    with start(album, tmp_path) as process:
        workers = psutil.Process(process.pid).children()
        select.select([], [], [], delay_s)
        process.kill()
    for name in environments(tmp_path):
        verify(tmp_path / name)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    subprocess.run(command(album, tmp_path), check=True, capture_output=True)
    assert fingerprints_of(tmp_path) == fingerprints
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected.jsonl", "train.lmdb", "val.lmdb"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(number: signal.Signals, code: int, album: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end the run soon and leave no traceback, process or unfinished environment."""
    with start(album, tmp_path) as process:
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(10) == code
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert list(tmp_path.iterdir()) == []
