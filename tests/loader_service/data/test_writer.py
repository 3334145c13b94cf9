"""An environment has its final name only when it is complete."""

from __future__ import annotations

import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import pytest

from loader_service.data.codecs import encode, header
from loader_service.data.manifest import Manifest, Rejected, Statistics
from loader_service.data.records import KEY, Records
from loader_service.data.writer import PROGRESS, Step, Writer, adopt, partial_path, partials
from loader_service.errors import DatasetInvalid

MakeDataset = Callable[..., Manifest]
GREY = encode(np.full((256, 256, 3), 128, np.uint8), "raw")


@contextmanager
def files_end_at(n_bytes: int) -> Iterator[None]:
    """Limit the size of this process's files to ``n_bytes``, which a writer sees as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_finish_leaves_only_the_environment(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """After finish() the folder holds the environment with its data file, and nothing else."""
    make_dataset(tmp_path / "deep" / "d.lmdb", 3)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["d.lmdb"]
    assert [p.name for p in (tmp_path / "deep" / "d.lmdb").iterdir()] == ["data.mdb"]


def test_the_manifest_says_what_was_written(tmp_path: Path, statistics: Statistics) -> None:
    """A reader finds count, classes, statistics, origin and rejections in the manifest."""
    with Writer(tmp_path / "d", codec="raw", class_names=("no", "yes")) as writer:
        assert [writer.put(label, GREY, f"{label}.png") for label in (1, 1, 0)] == [0, 1, 2]
        assert len(writer) == 3
        writer.reject("x.png", "not a picture")
        written = writer.finish(statistics, made_by={"resize": "none"})
    with Records(tmp_path / "d") as records:
        read = records.manifest
        assert read == written
        assert (read.count, read.class_names, read.class_counts) == (3, ("no", "yes"), (1, 2))
        assert read.rejected == (Rejected("x.png", "not a picture"),)
        assert read.made_by == {"resize": "none"}
        assert np.array_equal(records.statistics.mean_image, statistics.mean_image)
        assert np.array_equal(records.statistics.eigenvectors, statistics.eigenvectors)


def test_a_record_of_another_codec_is_refused(tmp_path: Path) -> None:
    """A record whose header has another codec is refused, and nothing is written."""
    with Writer(tmp_path / "d", codec="raw", class_names=("no", "yes")) as writer:
        with pytest.raises(ValueError, match="this environment holds raw records; this one has the codec number 1"):
            writer.put_record(memoryview(bytearray(header(0, "jpeg", GREY) + GREY)), "a.png")
        assert len(writer) == 0
        assert writer.put_record(memoryview(bytearray(header(1, "raw", GREY) + GREY)), "a.png") == 0


def test_the_same_records_give_the_same_manifest(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """Fingerprint and golden hash do not depend on when and where an environment was written."""
    assert make_dataset(tmp_path / "one", 5) == make_dataset(tmp_path / "two", 5)


def test_more_records_than_a_transaction_holds(tmp_path: Path, statistics: Statistics) -> None:
    """Records of several transactions are all stored, in order."""
    jpeg = encode(np.zeros((256, 256, 3), np.uint8), "jpeg")
    with Writer(tmp_path / "d", codec="jpeg", class_names=("a",)) as writer:
        for number in range(600):
            writer.put(0, jpeg, str(number))
        writer.finish(statistics, made_by={})
    with Records(tmp_path / "d") as records:
        assert len(records) == 600
        assert [records.source(n) for n in (0, 255, 256, 257, 599)] == ["0", "255", "256", "257", "599"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An error in the block removes the unfinished environment."""

    def interrupted() -> None:
        with Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
            writer.put(0, GREY, "a.png")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finishing_leaves_nothing(tmp_path: Path) -> None:
    """A block that ends without finish() leaves nothing."""
    with Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
        writer.put(0, GREY, "a.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_written_is_an_error(tmp_path: Path, statistics: Statistics) -> None:
    """An environment without records is refused, and nothing is left."""
    with (
        pytest.raises(DatasetInvalid, match="no source became a record"),
        Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer,
    ):
        writer.finish(statistics, made_by={})
    assert list(tmp_path.iterdir()) == []


def test_an_older_environment_is_replaced_at_the_end(
    tmp_path: Path, make_dataset: MakeDataset, statistics: Statistics
) -> None:
    """An older environment stays until finish(), and processes that have it open continue to read it."""
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
def test_a_full_disk_gives_one_error_and_leaves_nothing(
    tmp_path: Path, statistics: Statistics, room_bytes: int
) -> None:
    """A full disk, at the first byte or later, gives an error with the dataset's name and the reason."""

    def write() -> None:
        with files_end_at(room_bytes), Writer(tmp_path / "d", codec="raw", class_names=("a",)) as writer:
            for number in range(20):
                writer.put(0, GREY, f"{number}.png")
            writer.finish(statistics, made_by={})

    with pytest.raises(DatasetInvalid, match=r"the dataset at .*d cannot be used: LMDB cannot"):
        write()
    assert list(tmp_path.iterdir()) == []


IDENTITY = "0123456789abcdef"


def interrupted(path: Path, *, committed: int, lost: int) -> None:
    """Interrupt a writer of IDENTITY after it committed some records and a rejection."""
    with (
        suppress(KeyboardInterrupt),
        Writer(path, codec="raw", class_names=("a", "b"), identity=IDENTITY) as writer,
    ):
        for number in range(len(writer), committed):
            writer.put(number % 2, GREY, f"{number}.png")
        writer.reject("x.png", "not a picture")
        writer.commit(b"so far")
        for number in range(lost):
            writer.put(0, GREY, f"lost {number}.png")
        raise KeyboardInterrupt


def test_a_writer_resumes_from_its_last_commit(tmp_path: Path, statistics: Statistics) -> None:
    """The next writer resumes with the records, rejections and state of the last commit, and ends with the same manifest."""

    def write(path: Path, already: int) -> Manifest:
        with Writer(path, codec="raw", class_names=("a", "b"), identity=IDENTITY) as writer:
            assert len(writer) == already
            assert writer.state == (b"so far" if already else b"")
            assert [bad.source for bad in writer.rejected] == (["x.png"] if already else [])
            for number in range(already, 7):
                writer.put(number % 2, GREY, f"{number}.png")
            if not already:
                writer.reject("x.png", "not a picture")
            return writer.finish(statistics, made_by={})

    interrupted(tmp_path / "d", committed=4, lost=2)
    assert not (tmp_path / "d").exists()
    assert write(tmp_path / "d", 4) == write(tmp_path / "undisturbed", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "undisturbed"]


def test_an_identity_without_records_leaves_nothing(tmp_path: Path) -> None:
    """A writer with an identity but without committed records leaves nothing."""
    interrupted(tmp_path / "d", committed=0, lost=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept_bytes", [0, 4096, 300_000])
def test_a_damaged_partial_environment_is_replaced(tmp_path: Path, kept_bytes: int) -> None:
    """A damaged unfinished environment is replaced by an empty one."""
    interrupted(tmp_path / "d", committed=4, lost=0)
    os.truncate(partial_path(tmp_path / "d", IDENTITY) / "data.mdb", kept_bytes)
    with Writer(tmp_path / "d", codec="raw", class_names=("a", "b"), identity=IDENTITY) as writer:
        assert len(writer) == 0


def test_a_partial_environment_of_other_classes_is_replaced(tmp_path: Path) -> None:
    """An unfinished environment with more classes is replaced by an empty one."""
    interrupted(tmp_path / "d", committed=4, lost=0)
    with Writer(tmp_path / "d", codec="raw", class_names=("a",), identity=IDENTITY) as writer:
        assert len(writer) == 0


def test_partials_are_known_by_their_records(tmp_path: Path) -> None:
    """Unfinished environments of a name are listed with their numbers of committed records."""
    interrupted(tmp_path / "d", committed=4, lost=1)
    (tmp_path / ".d.0123.partial").mkdir()
    assert partials(tmp_path / "d") == {partial_path(tmp_path / "d", IDENTITY): 4, tmp_path / ".d.0123.partial": 0}


def test_a_complete_environment_is_adopted(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """A complete environment whose writer was killed before the rename gets its name."""
    manifest = make_dataset(tmp_path / "d", 3)
    (tmp_path / "d").rename(partial_path(tmp_path / "d", IDENTITY))
    assert partials(tmp_path / "d") == {partial_path(tmp_path / "d", IDENTITY): 3}
    assert adopt(tmp_path / "d", IDENTITY) == manifest
    assert adopt(tmp_path / "d", IDENTITY) is None
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_identity_is_hexadecimal(tmp_path: Path) -> None:
    """An identity must be hexadecimal, because it becomes part of a file name."""
    with pytest.raises(ValueError, match="hexadecimal"):
        Writer(tmp_path / "d", codec="raw", class_names=("a",), identity="../../0123456789abcdef")


def test_a_writer_resumes_after_a_full_disk(tmp_path: Path, statistics: Statistics) -> None:
    """After a full disk the error says how much is kept, and a later writer writes the rest."""

    def write() -> Manifest:
        with Writer(tmp_path / "d", codec="raw", class_names=("a",), identity=IDENTITY) as writer:
            for number in range(len(writer), 20):
                writer.put(0, GREY, f"{number}.png")
                writer.commit()
            return writer.finish(statistics, made_by={})

    with files_end_at(2_000_000), pytest.raises(DatasetInvalid, match=r"its first \d records are kept, to resume from"):
        write()
    (count,) = partials(tmp_path / "d").values()
    assert 0 < count < 20
    assert write().count == 20


def test_a_wild_label_in_the_progress_costs_no_memory(tmp_path: Path) -> None:
    """Progress with a label beyond the classes is damage: the writer starts again, and allocates no counter per label."""

    def write() -> int:
        with Writer(tmp_path / "d", codec="raw", class_names=("a",), identity=IDENTITY) as writer:
            kept = len(writer)
            writer.put(0, GREY, "a.png")
            writer.commit()
            return kept

    assert [write(), write()] == [0, 1]
    partial = str(partial_path(tmp_path / "d", IDENTITY))
    with lmdb.open(partial, max_dbs=4) as env, env.begin(write=True, db=env.open_db(PROGRESS)) as txn:
        wild = Step(header(2**27, "raw", GREY), [])
        txn.put(KEY.pack(0), msgspec.msgpack.encode(wild))
    tracemalloc.start()
    try:
        assert write() == 0
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**25  # 2**27 counters would take 1 GiB
