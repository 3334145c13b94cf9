"""Read-ahead finds the places of records without LMDB, and asks for them while reads are slow."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.data.codecs import CODECS
from loader_service.data.manifest import Manifest
from loader_service.data.readahead import SLICES, SLOW_S, ReadAhead
from loader_service.data.records import Records

HEADER_BYTES = 16


@pytest.fixture(name="many", scope="module")
def many_fixture(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment of many small records, so that its tree has branches above its leaves."""
    path = tmp_path_factory.mktemp("many") / "train.lmdb"
    make_dataset(path, 400, side=48)
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_every_record_is_at_its_reported_place(
    make_dataset: Callable[..., Manifest], tmp_path: Path, codec: str
) -> None:
    """For all codecs, the file has the record's bytes at the reported place, after the page header."""
    make_dataset(tmp_path / "train.lmdb", 5, codec=codec)
    _compare(tmp_path / "train.lmdb")


def test_a_tree_with_branches_is_walked(many: Path) -> None:
    """Records are found in a tree with several leaves."""
    assert _compare(many) == 400


@pytest.mark.parametrize("number", [400, 2**40])
def test_a_missing_record_has_no_place(many: Path, number: int) -> None:
    """A record that does not exist has no place."""
    with Records(many) as records:
        assert records.ahead.place(number) is None


def test_a_damaged_tree_raises_no_error(many: Path, tmp_path: Path) -> None:
    """A damaged file gives no places and raises no errors; LMDB reports the damage."""
    data = bytearray((many / "data.mdb").read_bytes())
    with Records(many) as records:
        database = bytes(records.ahead.database)
    random = np.random.default_rng(3)
    rubbish = tmp_path / "data.mdb"
    for _ in range(50):
        places = random.integers(0, len(data), 20_000)
        for place, value in zip(places.tolist(), random.integers(0, 256, len(places)).tolist(), strict=True):
            data[place] = value
        rubbish.write_bytes(data[: random.integers(0, len(data))])
        ahead = ReadAhead(rubbish, database, 4096)
        for number in range(0, 400, 7):
            ahead.place(number)
        ahead.ask(np.arange(400))
        ahead.close()


def test_a_slice_is_asked_for_while_reading_is_slow(many: Path) -> None:
    """The first slice is read ahead, and then SLICES slices after every slow one."""
    with Records(many) as records:
        ahead, numbers = records.ahead, np.arange(10)
        assert ahead.is_wanted
        ahead.ask(numbers)
        ahead.learn(10, 10 * SLOW_S / 2)
        assert not ahead.is_wanted
        ahead.learn(10, 10 * SLOW_S * 2)
        for _ in range(SLICES):
            assert ahead.is_wanted
            ahead.ask(numbers)
            ahead.learn(10, 0.0)
        assert not ahead.is_wanted


def test_records_asked_for_are_loaded_into_memory(many: Path) -> None:
    """Pages of a record that were dropped from memory are back after it was asked for, without a read."""
    path = many / "data.mdb"
    with Records(many) as records:
        place = records.ahead.place(200)
    assert place is not None
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if _resident(file, *place):
            pytest.skip("this file system keeps files in memory")
        with Records(many) as records:
            records.ahead.ask(np.array([200]))
            for _ in range(10_000):
                if _resident(file, *place):
                    break
                os.sched_yield()
        assert _resident(file, *place)
    finally:
        os.close(file)


def _compare(path: Path) -> int:
    """Compare the place of every record with LMDB's value; return the number of records."""
    file = (path / "data.mdb").read_bytes()
    compared = 0
    with Records(path) as records, records.values() as values:
        for number, value in enumerate(values.stored(np.arange(len(records)))):
            place = records.ahead.place(number)
            if len(value) < mmap.PAGESIZE // 2 and place is None:
                continue  # it lies in the leaf
            assert place is not None
            offset, size = place
            assert file[offset + HEADER_BYTES : offset + size] == bytes(value)
            compared += 1
    return compared


def _resident(file: int, offset: int, size: int) -> bool:
    """Return True if all pages of a range are in memory; mincore() does not load them."""
    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        memory = np.frombuffer(mapped, np.uint8)
        done = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(memory.ctypes.data + offset), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        del memory
        assert done == 0, os.strerror(ctypes.get_errno())
        return bool((pages & 1).all())
