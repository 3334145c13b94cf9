"""The pool yields every item's record in order, whichever worker dies."""

from __future__ import annotations

import os
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from loader_service.data.codecs import HEADER, RAW_BYTES, SHAPE, header
from loader_service.data.image_file import load_picture
from loader_service.datasets.preprocessing.pool import Pool, Result
from loader_service.datasets.preprocessing.sources import Item, label_files, list_files


@pytest.fixture(scope="module")
def items(album: Path) -> list[Item]:
    """Return all files of the album's training split: three chunks, with three files that are not images."""
    return list(label_files(album, list_files(album / "train")).items)


def collect(results: Iterator[Result]) -> list[tuple[str, bytes | str]]:
    """Return source and record of every item, copied while the views are valid."""
    return [
        (item.source, record if isinstance(record, str) else bytes(record))
        for result in results
        for item, record in zip(result.items, result.records, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(items: list[Item], album: Path) -> list[tuple[str, bytes | str]]:
    """Return the expected raw records, in order."""

    def record(item: Item) -> bytes | str:
        if item.source.endswith(".txt"):
            return "it is in no known image format"
        payload = load_picture(album / "train" / item.source).tobytes()
        return header(item.label, "raw", payload) + payload

    return [(item.source, record(item)) for item in items]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int, items: list[Item], expected: list[tuple[str, bytes | str]]) -> None:
    """Records and reasons come in the order of the items, and the block leaves no process behind."""
    with Pool(workers, "raw", {}, 60) as pool:
        processes = [psutil.Process(pid) for pid in pool.pids]
        assert collect(pool.run(items)) == expected
    assert not any(process.is_running() for process in processes)


def test_sums_are_of_the_records(items: list[Item]) -> None:
    """Each chunk has the sums of its records' pixels."""
    with Pool(2, "raw", {}, 60) as pool:
        for result in pool.run(items):
            good = [
                np.frombuffer(record, np.uint8, offset=HEADER.size).reshape(SHAPE)
                for record in result.records
                if not isinstance(record, str)
            ]
            assert result.count == len(good)
            np.testing.assert_array_equal(result.image, np.sum(good, axis=0, dtype=np.uint32))
            flat = np.concatenate(good).reshape(-1, 3).astype(np.int64)
            np.testing.assert_array_equal(result.products, flat.T @ flat)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_replaced(victim: int, items: list[Item], expected: list[tuple[str, bytes | str]]) -> None:
    """Workers that are killed at the start and during the run do not change the results."""
    with Pool(2, "raw", {}, 60) as pool:
        first = pool.pids[victim]
        os.kill(first, signal.SIGKILL)
        found = []
        for result in pool.run(items):
            found += collect(iter([result]))
            os.kill(pool.pids[1 - victim], signal.SIGKILL)
        assert first not in pool.pids
    assert found == expected


def slow_picture() -> bytes:
    """Return a PNG of 84 million black pixels in 80 KB: within the limits, and slow to decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = 9200
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_no_file_can_hang_the_run(items: list[Item], expected: list[tuple[str, bytes | str]], tmp_path: Path) -> None:
    """A file that takes too long is rejected, and its neighbours are not."""
    path = tmp_path / "slow.png"
    path.write_bytes(slow_picture())
    slow = Item("slow.png", 0, os.fsencode(path), 0, 0, path.stat().st_size)
    with Pool(1, "raw", {}, 0.1) as pool:
        found = collect(pool.run([items[0], slow, *items[1:]]))
    assert found[1] == ("slow.png", "it took too long to decode")
    assert [found[0], *found[2:]] == expected


def test_jpeg_records_are_small(items: list[Item]) -> None:
    """Workers encode jpeg payloads."""
    with Pool(1, "jpeg", {"quality": 50, "subsampling": "420"}, 60) as pool:
        records = [record for _, record in collect(pool.run(items)) if isinstance(record, bytes)]
    assert all(r[HEADER.size :].startswith(b"\xff\xd8") and len(r) < RAW_BYTES // 4 for r in records)
