"""What is measured once, not in turns: the start, memory, the order of a billion records, and preprocessing."""

from __future__ import annotations

import os
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
import psutil

from loader_service import Loader
from loader_service.client.query import status
from loader_service.data.order import records_at
from loader_service.data.picture import load_picture
from loader_service.spec import RECORD_SIDE_PX
from tools.bench.contest import ROOT, Contestant, Running
from tools.bench.ours import node
from tools.bench.turns import BATCH, deliver
from tools.command import ToolFailed

BILLION: Final = 10**9
STARTS: Final = 5
PREPROCESSED: Final = 6000
"""Files to preprocess: enough that starting Python is little of it."""


class Single(msgspec.Struct, frozen=True):
    """The figures.

    Fields:
        first_batch_s: from the start of the node's process to the first batch in a client's hands, the median; and each.
        order_us: microseconds for 128 positions of an order over a billion records.
        worker_mb: what each worker has of its own, 10**6 bytes, after an epoch; LMDB's pages and slots are shared.
        torch_free: no worker has a file of torch mapped.
        preprocess_per_s: originals per second of `tools.preprocess` as a whole, process start included.
        standardise_per_s: decoding and resizing alone, by as many processes.
        originals: how many files, and how large on average.
    """

    first_batch_s: float
    starts_s: list[float]
    order_us: float
    worker_mb: list[float]
    torch_free: bool
    preprocess_per_s: float
    standardise_per_s: float
    originals: int


def first_batch_s(data: Path, workers: int) -> float:
    """Seconds from the start of a node's process to a batch."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        start = time.perf_counter()
        with node(data, f"ipc://{folder}/node", workers) as address, Loader(address, batch_size=BATCH) as loader:
            next(loader)
            return time.perf_counter() - start


def order_us() -> float:
    """Microseconds for the records of 128 positions in an order over a billion, at places all over it."""
    places = range(0, BILLION - BATCH, BILLION // 200)
    start = time.perf_counter()
    for place in places:
        records_at(BILLION, 1, 2, place, BATCH)
    return 1e6 * (time.perf_counter() - start) / len(places)


def own_bytes(process: psutil.Process) -> int:
    """Memory that a process has to itself: LMDB's file may have pages that only one worker has touched so far."""
    return sum(
        area.private_clean + area.private_dirty
        for area in process.memory_maps(grouped=True)
        if not area.path.endswith("data.mdb")
    )


def worker_memory(data: Path, workers: int) -> tuple[list[float], bool]:
    """Each worker's own memory after an epoch, in 10**6 bytes; and whether torch is in none of them."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        address = f"ipc://{folder}/node"
        with node(data, address, workers) as address, Loader(address, batch_size=BATCH) as loader:
            for _ in loader:
                pass
            processes = [psutil.Process(worker.pid) for worker in status(address).workers]
            mapped = [area.path for process in processes for area in process.memory_maps()]
            return [own_bytes(process) / 1e6 for process in processes], not any("torch" in path for path in mapped)


def preprocessing(source: Path, workers: int, files: int) -> tuple[float, float, int]:
    """Originals per second: the whole of preprocessing, decoding and resizing alone, and how many there were."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-", dir=ROOT / "build") as folder:
        tree = Path(folder) / "originals"
        count = _lay_out(source, tree, files)
        took_s = preprocess_s(tree, Path(folder) / "out", workers)
        return count / took_s, standardising(tree, workers), count


def preprocess_s(source: Path, out: Path, workers: int, size: int = RECORD_SIDE_PX) -> float:
    """Seconds that the command takes from its start to its end, for raw records of one split in ``out``."""
    command = [sys.executable, "-m", "tools.preprocess", str(source), str(out), "--val-fraction", "0"]
    command += ["--codec", "raw", "--workers", str(workers), "--size", str(size)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - start
    if done.returncode:
        raise ToolFailed(f"preprocessing failed: {done.stderr.strip()[-300:]}")
    return took_s


def standardising(tree: Path, workers: int, size: int = RECORD_SIDE_PX) -> float:
    """Pictures per second of decoding and resizing the files below a folder, by so many processes, and nothing else."""
    command = (sys.executable, "-m", "tools.bench.single", str(tree), "--size", str(size))
    with Running(Contestant("standardise", "", "raw", "limit", command, workers)) as running:
        running.wait()
        return running.turn(0.5, 3.0).images_per_s


def _lay_out(source: Path, tree: Path, files: int) -> int:
    """Photographs as a folder of one class, each as often as it takes to have ``files``; returns how many there are."""
    (tree / "photographs").mkdir(parents=True)
    if source.is_dir():
        contents = [path.read_bytes() for path in sorted(source.rglob("*.jpg"))]
    else:
        with tarfile.open(source) as archive:
            contents = [file.read() for member in archive if (file := archive.extractfile(member))]
    for number in range(files):
        (tree / "photographs" / f"{number:05}.jpg").write_bytes(contents[number % len(contents)])
    return files


def measure(records: Path, source: Path, workers: int, files: int = PREPROCESSED) -> Single:
    """All of it."""
    starts = [first_batch_s(records / "raw", workers) for _ in range(STARTS)]
    memory, torch_free = worker_memory(records / "raw", workers)
    whole, alone, count = preprocessing(source, workers, files)
    return Single(statistics.median(starts), starts, order_us(), memory, torch_free, whole, alone, count)


@click.command()
@click.argument("tree", type=click.Path(path_type=Path))
@click.option("--size", type=int, default=RECORD_SIDE_PX)
def main(tree: Path, size: int) -> None:
    """Decode and resize the photographs in TREE, over and over (a contestant)."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    first = os.getpid() % len(paths)
    order = paths[first:] + paths[:first]
    deliver(len([load_picture(path, side=size)]) for path in cycle(order))


if __name__ == "__main__":
    main()
