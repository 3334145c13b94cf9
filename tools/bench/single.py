"""Measurements without turns: start-up, memory, the order of a billion records, checksums, and preprocessing."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Final

import click
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from loader_service import Loader, LocalNode
from loader_service.client.query import status
from loader_service.data.image_file import FILTER
from loader_service.data.order import records_at
from loader_service.types import RECORD_SIDE_PX
from tools.bench import checksums
from tools.bench.contest import Contestant, Kind, Running
from tools.bench.studies import boundary
from tools.bench.studies.boundary import Boundary
from tools.bench.turns import BATCH, deliver
from tools.errors import ToolFailed
from tools.terminal import ROOT

BILLION: Final = 10**9  # far above order.TABLE_MAX, so the Feistel network is measured
STARTS: Final = 5
PREPROCESSED: Final = 6000
"""Number of files to preprocess: enough to make the start of Python a small share."""

PREPROCESSINGS: Final = 5
COMPARED: Final = 1024
"""Records of each codec whose comparison is measured: more than fit into the CPU's caches."""


class Single(msgspec.Struct, frozen=True):
    """The figures.

    Fields:
        first_batch_s: median seconds from the start of the node's process to the first batch at a client.
        starts_s: the same, of each start.
        order_us: microseconds for 128 positions of an order over a billion records.
        worker_mb: private memory of each worker after an epoch, 10**6 bytes; LMDB's pages and slots are shared.
        torch_free: whether no worker has a file of torch mapped.
        preprocess_per_s: originals per second of `loader-service preprocess`, process start included, in each round.
        standardise_per_s: originals per second of decoding and resizing alone, by as many processes, in each round.
        originals: number of files.
        checksums: cost of comparing records with their checksums, by row of ``checksums.ROWS``, in each round.
        boundary: the time between two epochs; None in results of before it was measured.
    """

    first_batch_s: float
    starts_s: list[float]
    order_us: float
    worker_mb: list[float]
    torch_free: bool
    preprocess_per_s: list[float]
    standardise_per_s: list[float]
    originals: int
    checksums: dict[str, list[float]]
    boundary: Boundary | None = None


def first_batch_s(data: Path, workers: int) -> float:
    """Return the seconds from the start of a node's process to the first batch at a client."""
    start = time.perf_counter()
    with LocalNode(data, workers) as node, Loader(node.address, batch_size=BATCH) as loader:
        next(iter(loader))
        # Inside the block: the shutdown does not count.
        return time.perf_counter() - start


def order_us() -> float:
    """Return the mean microseconds for 128 positions in an order over a billion records, at places all over it."""
    places = range(0, BILLION - BATCH, BILLION // 200)  # 200 places
    start = time.perf_counter()
    for place in places:
        records_at(BILLION, 1, 2, place, BATCH)  # count, seed, epoch, first position, positions
    return 1e6 * (time.perf_counter() - start) / len(places)


def own_bytes(process: psutil.Process) -> int:
    """Return a process's private memory. LMDB's file is left out: pages that one worker alone has touched look private."""
    return sum(
        area.private_clean + area.private_dirty
        for area in process.memory_maps(grouped=True)
        if not area.path.endswith("data.mdb")
    )


def worker_memory(data: Path, workers: int) -> tuple[list[float], bool]:
    """Return each worker's private memory after an epoch, 10**6 bytes, and whether no worker has torch mapped."""
    with LocalNode(data, workers) as node, Loader(node.address, batch_size=BATCH) as loader:
        # A whole epoch first, so that workers have allocated all that serving takes.
        for _ in loader:
            pass
        processes = [psutil.Process(worker.pid) for worker in status(node.address).workers]
        # Mapped files show an import of torch by any module, also by a dependency.
        mapped = [area.path for process in processes for area in process.memory_maps()]
        return [own_bytes(process) / 1e6 for process in processes], not any("torch" in path for path in mapped)


def preprocessing(source: Path, workers: int, files: int) -> tuple[list[float], list[float]]:
    """Return originals per second in each round: of the whole command, and of decoding and resizing alone."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-", dir=ROOT / "build") as folder:
        tree, out = Path(folder) / "originals", Path(folder) / "out"
        _lay_out(source, tree, files)
        whole, alone = list[float](), list[float]()
        for _ in range(PREPROCESSINGS):
            # Both in each round, so that the ratio of a pair compares the same minute.
            whole.append(files / preprocess_s(tree, out, workers))
            alone.append(standardising(tree, workers))
            shutil.rmtree(out)  # finished environments would be kept, not made again
        return whole, alone


def preprocess_s(source: Path, out: Path, workers: int, size: int = RECORD_SIDE_PX) -> float:
    """Return the seconds that `loader-service preprocess` takes to write raw records of one split to ``out``."""
    command = [sys.executable, "-m", "loader_service", "preprocess", str(source), str(out), "--val-fraction", "0"]
    command += ["--codec", "raw", "--workers", str(workers), "--size", str(size)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - start  # before the check: only the command's time counts
    if done.returncode:
        raise ToolFailed(f"preprocessing failed: {done.stderr.strip()[-300:]}")
    return took_s


def standardising(tree: Path, workers: int, size: int = RECORD_SIDE_PX) -> float:
    """Return images per second of decoding and resizing the files below a folder, and nothing else."""
    command = (sys.executable, "-m", "tools.bench.single", str(tree), "--size", str(size))
    with Running(Contestant("standardise", "", "raw", Kind.LIMIT, command, workers)) as running:
        running.wait()
        return running.turn(0.5, 3.0).images_per_s  # seconds of warm-up and of the turn


def _lay_out(source: Path, tree: Path, files: int) -> None:
    """Write ``files`` photographs as a folder of one class, repeating them as often as needed."""
    (tree / "photographs").mkdir(parents=True)
    if source.is_dir():
        contents = [path.read_bytes() for path in sorted(source.rglob("*.jpg"))]
    else:
        with tarfile.open(source) as archive:
            contents = [file.read() for member in archive if (file := archive.extractfile(member))]
    for number in range(files):
        (tree / "photographs" / f"{number:05}.jpg").write_bytes(contents[number % len(contents)])


def measure(records: Path, source: Path, workers: int, files: int = PREPROCESSED) -> Single:
    """Take all measurements."""
    starts = [first_batch_s(records / "raw", workers) for _ in range(STARTS)]
    memory, torch_free = worker_memory(records / "raw", workers)
    whole, alone = preprocessing(source, workers, files)
    costs = checksums.costs(source, COMPARED)
    between = boundary.measure(records / "raw", workers)
    start_s = statistics.median(starts)
    return Single(start_s, starts, order_us(), memory, torch_free, whole, alone, files, costs, between)


@click.command()
@click.argument("tree", type=click.Path(path_type=Path))
@click.option("--size", type=int, default=RECORD_SIDE_PX)
def main(tree: Path, size: int) -> None:
    """Decode and resize the photographs in TREE again and again, as a contestant."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    # Copies of this process begin at different files, so that they do not decode the same one at the same time.
    first = os.getpid() % len(paths)
    order = paths[first:] + paths[:first]
    # Decodes one image and yields 1: the length of a list that holds it alone.
    deliver(len([standardised(path, size)]) for path in cycle(order))


def standardised(path: Path, side: int) -> npt.NDArray[np.uint8]:
    """Return a record's pixels, (side, side, 3) uint8, as libjpeg-turbo and Pillow-SIMD make them of a sound photograph."""
    with Image.open(path) as image:
        # libjpeg-turbo scales by 1/2, 1/4 or 1/8 while it decodes, as long as both sides stay at least `side`.
        image.draft(None, (side, side))
        short = min(image.size)
        left, top = ((length - short) / 2 for length in image.size)  # half a pixel where the difference is odd
        square = image.convert("RGB").resize((side, side), FILTER, box=(left, top, left + short, top + short))
    return np.asarray(square)


if __name__ == "__main__":
    main()
