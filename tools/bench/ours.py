"""This project as a contestant (see ``turns``): a node of its own, and a loader in this process."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import click
import numpy as np

from loader_service import Batch, Loader, LocalNode, defaults
from loader_service.client.query import status
from loader_service.data.augment import complete_view
from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import Records
from loader_service.local_node import PROGRAM
from loader_service.types import SampleLayout, SliceId, View
from loader_service.wire.auth import generate
from loader_service.wire.messages import WorkerStatus
from tools.bench.altered import alter
from tools.bench.turns import BATCH, WORKERS_DEFAULT, deliver, touch
from tools.errors import ToolFailed

SEED: Final = 7
CHECK_EVERY: Final = 16
"""One batch in so many is compared with the pure function."""

CHECKED: Final = 2
"""Number of samples compared of such a batch."""


def start_node(
    data: Path, bind: str | None, workers: int, keys: Path | None = None, changes: str = "", options: Sequence[str] = ()
) -> LocalNode:
    """Start a node that ends with this process; ``changes`` alters its defaults, as ``altered`` takes them."""
    # The node is another process, so it alters its own copy of the defaults before it reads them.
    program = (sys.executable, "-m", "tools.bench.altered", changes) if changes else PROGRAM
    return LocalNode(data, workers, bind=bind, keys=keys, options=options, program=program)


def pin(workers: Iterable[WorkerStatus]) -> None:
    """Pin each worker of a node to one CPU, round robin."""
    cpus = sorted(os.sched_getaffinity(0))
    for number, worker in enumerate(workers):
        os.sched_setaffinity(worker.pid, {cpus[number % len(cpus)]})  # not inherited by a worker that replaces it


class Consumer:
    """A consumer that touches every page of each batch and compares some batches with the pure function.

    Args:
        loader: loader whose batches it consumes.
        records: dataset that the node serves.

    Fields:
        spent_s: CPU seconds spent here, which are the benchmark's, not the loader's.
    """

    def __init__(self, loader: Loader, records: Records) -> None:
        self._loader, self._records = loader, records
        self._view = complete_view(View(), records.statistics)
        self.spent_s = 0.0

    def counts(self) -> Iterator[int]:
        """Yield the number of images of each batch.

        Raises:
            ToolFailed: a batch differs from what the pure function makes of its positions.
        """
        for number, batch in enumerate(self._loader.all_epochs()):
            # This thread's CPU time: the session's thread works for the loader meanwhile, which counts.
            start_s = time.thread_time()
            images = touch(batch.images)
            if number % CHECK_EVERY == 0:
                # The first index moves on with each check, so that over a run all places of a batch are compared.
                self._check(batch, number // CHECK_EVERY * CHECKED % (images - CHECKED + 1))
            self.spent_s += time.thread_time() - start_s
            del batch  # frees its slot before the next batch is asked for
            yield images

    def _check(self, batch: Batch, first: int) -> None:
        chosen = slice(first, first + CHECKED)
        # Positions of a batch follow one another, so any part of it is a slice too.
        what = SliceId(self._view, SEED, batch.epoch, batch.start + first, CHECKED)
        pure = empty_slice(SampleLayout(self._view, "uint8"), CHECKED)
        fill(pure, self._records, what)
        if not (
            np.array_equal(pure.images, batch.images[chosen]) and np.array_equal(pure.labels, batch.labels[chosen])
        ):
            raise ToolFailed(f"position {what.start} of epoch {what.epoch} differs from what the pure function makes.")


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--transport", type=click.Choice(["shm", "tcp"]), default="shm")
@click.option("--curve", is_flag=True, help="Encrypt, with fresh keys.")
@click.option("--workers", type=int, default=WORKERS_DEFAULT)
@click.option("--defaults", "changes", default="", metavar="NAME=VALUE,...", help="Altered defaults.")
@click.option("--io-threads", type=int, help="I/O threads of the node.  [default: as many as connections]")
@click.option("--pinned", is_flag=True, help="Pin workers to CPUs.")
def main(
    data: Path,
    transport: Literal["shm", "tcp"],
    curve: bool,
    workers: int,
    changes: str,
    io_threads: int | None,
    pinned: bool,
) -> None:
    """Deliver batches of a node's records in DATA."""
    # First: the lines below read the altered values. They are passed on explicitly, because the defaults of Loader's
    # parameters were bound on import.
    alter(changes)
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        keys = Path(folder) / "keys" if curve else None
        if keys:
            generate(keys)
        plain = transport == "tcp" and not curve
        access: dict[str, Any] = {"insecure": plain}
        if keys:
            access |= {"server_key": keys / "node.key", "client_key": keys / "client.secret"}
        options = ("--io-threads", str(io_threads or defaults.CONNECTIONS), *(("--insecure",) if plain else ()))
        # None: an ipc socket in a private folder. A node with keys listens at TCP also for clients in shared memory.
        bind = "tcp://127.0.0.1:*" if transport == "tcp" or curve else None
        with (
            # Ends last: the loader says Bye to a node that still runs.
            start_node(data, bind, workers, keys, changes, options) as node,
            Loader(
                node.address,
                batch_size=BATCH,
                seed=SEED,
                transport=transport,
                drop_last=True,  # every batch has 128 images, as those of peers
                prefetch=defaults.PREFETCH,
                connections=defaults.CONNECTIONS,
                **access,
            ) as loader,
            Records(data / "train.lmdb") as records,
        ):
            if pinned:
                # The node's answer has the pids of its workers.
                pin(status(node.address, **access).workers)
            consumer = Consumer(loader, records)
            deliver(consumer.counts(), lambda: consumer.spent_s)


if __name__ == "__main__":
    main()
