"""Writing an environment: whole under its name, or not at all."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loader_service.data.records import Manifest, Records, Rejected, Statistics, encode
from loader_service.data.writer import Writer
from loader_service.errors import DatasetInvalid

MakeDataset = Callable[..., Manifest]
GREY = encode(np.full((256, 256, 3), 128, np.uint8), "raw")


@contextmanager
def files_end_at(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``n_bytes``: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_finished_environment_stands_under_its_name_alone(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """After finish there is the environment with its data file, and nothing beside it."""
    make_dataset(tmp_path / "deep" / "d.lmdb", 3)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["d.lmdb"]
    assert [p.name for p in (tmp_path / "deep" / "d.lmdb").iterdir()] == ["data.mdb"]


def test_the_manifest_says_what_was_written(tmp_path: Path, statistics: Statistics) -> None:
    """Count, classes, statistics, origin and rejections are all there for a reader."""
    with Writer(tmp_path / "d", codec="raw", class_names=("no", "yes")) as writer:
        assert [writer.put(label, GREY, f"{label}.png") for label in (1, 1, 0)] == [0, 1, 2]
        assert len(writer) == 3
        written = writer.finish(statistics, made_by={"resize": "none"}, rejected=[Rejected("x.png", "not a picture")])
    with Records(tmp_path / "d") as records:
        read = records.manifest
        assert read == written
        assert (read.count, read.class_names, read.class_counts) == (3, ("no", "yes"), (1, 2))
        assert read.rejected == (Rejected("x.png", "not a picture"),)
        assert read.made_by == {"resize": "none"}
        assert np.array_equal(records.statistics.mean_image, statistics.mean_image)
        assert np.array_equal(records.statistics.eigenvectors, statistics.eigenvectors)


def test_the_same_records_give_the_same_manifest(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """Fingerprint and golden hash do not depend on when and where an environment was written."""
    assert make_dataset(tmp_path / "one", 5) == make_dataset(tmp_path / "two", 5)


def test_more_records_than_a_transaction_holds(tmp_path: Path, statistics: Statistics) -> None:
    """Records on both sides of a commit are all there, in order."""
    jpeg = encode(np.zeros((256, 256, 3), np.uint8), "jpeg")
    with Writer(tmp_path / "d", codec="jpeg", class_names=("a",)) as writer:
        for number in range(600):
            writer.put(0, jpeg, str(number))
        writer.finish(statistics, made_by={})
    with Records(tmp_path / "d") as records:
        assert len(records) == 600
        assert [records.source(n) for n in (0, 255, 256, 257, 599)] == ["0", "255", "256", "257", "599"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An error in the block removes the half-written environment."""

    def interrupted() -> None:
        with Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
            writer.put(0, GREY, "a.png")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finishing_leaves_nothing(tmp_path: Path) -> None:
    """A block that ends without finish has written nothing under the name."""
    with Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
        writer.put(0, GREY, "a.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_written_is_an_error(tmp_path: Path, statistics: Statistics) -> None:
    """An environment of no records is refused, and nothing is left."""
    with (
        pytest.raises(DatasetInvalid, match="no source became a record"),
        Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer,
    ):
        writer.finish(statistics, made_by={})
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_stood_there_is_replaced_at_the_end(
    tmp_path: Path, make_dataset: MakeDataset, statistics: Statistics
) -> None:
    """Until finish the old one stands; whoever has it open goes on reading it."""
    make_dataset(tmp_path / "d", 4)
    inode = (tmp_path / "d" / "data.mdb").stat().st_ino
    with Records(tmp_path / "d") as old:
        with Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
            writer.put(0, GREY, "a.png")
            assert (tmp_path / "d" / "data.mdb").stat().st_ino == inode
            writer.finish(statistics, made_by={})
        assert old.pixels(3)[0] == 0
        with Records(tmp_path / "d") as new:
            assert len(new) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("room_bytes", [10_000, 2_000_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, statistics: Statistics, room_bytes: int
) -> None:
    """When the disk is full, whether at the first byte or in the middle, the sentence names the dataset and why."""

    def write() -> None:
        with files_end_at(room_bytes), Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
            for number in range(20):
                writer.put(0, GREY, f"{number}.png")
            writer.finish(statistics, made_by={})

    with pytest.raises(DatasetInvalid, match=r"the dataset at .*d cannot be used: LMDB cannot"):
        write()
    assert list(tmp_path.iterdir()) == []
