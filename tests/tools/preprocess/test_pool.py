"""The pool gives every item's payload in order, whoever dies."""

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

from loader_service.data.codecs import RAW_BYTES, SHAPE
from loader_service.data.picture import load_picture
from tools.preprocess.pool import Pool, Result
from tools.preprocess.sources import Item, label_files, list_files
from tools.statistics import colour_products


@pytest.fixture(scope="module")
def items(album: Path) -> list[Item]:
    """All files of the album's training split: three chunks, three files that are no pictures."""
    return list(label_files(album, list_files(album / "train")).items)


def collect(results: Iterator[Result]) -> list[tuple[str, bytes | str]]:
    """Source and payload of every item, copied while the views are valid."""
    return [
        (item.source, payload if isinstance(payload, str) else bytes(payload))
        for result in results
        for item, payload in zip(result.items, result.payloads, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(items: list[Item], album: Path) -> list[tuple[str, bytes | str]]:
    """What raw payloads must come, in order."""
    unknown = "it is in no known picture format"
    return [
        (i.source, unknown if i.source.endswith(".txt") else load_picture(album / "train" / i.source).tobytes())
        for i in items
    ]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int, items: list[Item], expected: list[tuple[str, bytes | str]]) -> None:
    """Payloads and reasons come in the items' order; the block leaves no process behind."""
    with Pool(workers, "raw", {}, 60) as pool:
        processes = [psutil.Process(pid) for pid in pool.pids]
        assert collect(pool.run(items)) == expected
    assert not any(process.is_running() for process in processes)


def test_sums_are_of_the_payloads(items: list[Item]) -> None:
    """Each chunk's sums are those of its payloads' pixels."""
    with Pool(2, "raw", {}, 60) as pool:
        for result in pool.run(items):
            good = [np.frombuffer(p, np.uint8).reshape(SHAPE) for p in result.payloads if not isinstance(p, str)]
            assert result.count == len(good)
            np.testing.assert_array_equal(result.image, np.sum(good, axis=0, dtype=np.uint32))
            np.testing.assert_array_equal(result.products, sum(colour_products(pixels) for pixels in good))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_replaced(victim: int, items: list[Item], expected: list[tuple[str, bytes | str]]) -> None:
    """Workers killed at the start and in the middle change nothing."""
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
    """A PNG of 84 million black pixels in 80 KB: within the limits, and slow to decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = 9200
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_no_file_can_hang_the_run(items: list[Item], expected: list[tuple[str, bytes | str]], tmp_path: Path) -> None:
    """A file that takes longer than allowed is rejected by name, and its neighbours are not."""
    path = tmp_path / "slow.png"
    path.write_bytes(slow_picture())
    slow = Item("slow.png", 0, os.fsencode(path), 0, 0, path.stat().st_size)
    with Pool(1, "raw", {}, 0.1) as pool:
        found = collect(pool.run([items[0], slow, *items[1:]]))
    assert found[1] == ("slow.png", "it took too long to decode")
    assert [found[0], *found[2:]] == expected


def test_jpeg_payloads_are_small(items: list[Item]) -> None:
    """Payloads are encoded by the workers."""
    with Pool(1, "jpeg", {"quality": 50, "subsampling": "420"}, 60) as pool:
        payloads = [payload for _, payload in collect(pool.run(items)) if isinstance(payload, bytes)]
    assert all(payload.startswith(b"\xff\xd8") and len(payload) < RAW_BYTES // 4 for payload in payloads)
