"""CPU time per batch, of each process of a node and each thread of its client.

python -m tools.bench.studies.profile [--codec raw|jpeg] [--transport shm|tcp] [--connections N] [--keys] [--records build/bench/records-8192]

It reads records that ``make bench`` has made. The time that touching the batch takes is the benchmark's own and left out.
"""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Final, Literal

import click
import psutil

from loader_service import Loader, defaults
from loader_service.cli.job import CONTEXT, Job
from loader_service.wire.auth import generate
from tools.bench.ours import SEED, start_node
from tools.bench.turns import BATCH, WORKERS_DEFAULT, touch
from tools.errors import ToolFailed
from tools.terminal import ROOT

WARM_S: Final = 1.0
MIN_US: Final = 1.0
"""Processes and threads that take less per batch are not shown."""


def spent_s(loader: psutil.Process) -> dict[str, float]:
    """Return the CPU seconds so far of this process's threads and of its descendants, by a name for people."""
    # Kernel thread ids, as psutil's. Python does not know the threads that libzmq starts.
    seconds = {f"client, libzmq {thread.id}": thread.user_time + thread.system_time for thread in loader.threads()}
    for thread in threading.enumerate():
        assert thread.ident is not None  # it runs
        seconds.pop(f"client, libzmq {thread.native_id}", None)
        # Exact, unlike the others, which the kernel counts in ticks: _consume's share is subtracted from it.
        own_s = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        seconds[f"client, {thread.name} {thread.native_id}"] = own_s
    for process in loader.children(recursive=True):  # dispatcher, fork server and workers
        times = process.cpu_times()
        seconds[f"node, process {process.pid}"] = times.user + times.system
    return seconds


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--codec", type=click.Choice(["raw", "jpeg"]), default="raw", show_default=True, help="Codec of the records."
)
@click.option("--transport", type=click.Choice(["shm", "tcp"]), default="shm", show_default=True)
@click.option("--records", type=click.Path(path_type=Path), default=ROOT / "build" / "bench" / "records-8192")
@click.option("--workers", type=click.IntRange(1), default=WORKERS_DEFAULT, show_default=True)
@click.option(
    "--connections",
    type=click.IntRange(1),
    default=defaults.CONNECTIONS,
    show_default=True,
    help="Connections over TCP.",
)
@click.option("--keys", is_flag=True, help="Encrypt, with fresh keys.")
@click.option("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True)
def main(
    codec: str,
    transport: Literal["shm", "tcp"],
    records: Path,
    workers: int,
    connections: int,
    keys: bool,
    seconds: float,
) -> None:
    """Print the CPU time per batch of 128, of each process of a node and each thread of its client."""
    data = records / codec
    if not (data / "train.lmdb").exists():
        raise ToolFailed(f"there are no records in {data}; make bench makes them.")
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        bind = "tcp://127.0.0.1:*" if transport == "tcp" else None
        made = Path(folder) / "keys" if keys else None
        plain = transport == "tcp" and not keys
        if made:
            generate(made)
        with (
            start_node(data, bind, workers, made, options=("--insecure",) if plain else ()) as node,
            Loader(
                node.address,
                batch_size=BATCH,
                seed=SEED,
                transport=transport,
                drop_last=True,
                connections=connections,
                server_key=made / "node.key" if made else None,
                client_key=made / "client.secret" if made else None,
                insecure=plain,
            ) as loader,
        ):
            _consume(loader, WARM_S)  # connections, page tables and caches are warm after that
            this = psutil.Process()
            before, faults_before = spent_s(this), _faults()
            batches, touching_s, took_s = _consume(loader, seconds)
            after, faults = spent_s(this), _faults() - faults_before
    click.echo(f"{batches * BATCH / took_s:,.0f} images/s in batches of {BATCH}; microseconds of CPU time per batch:")
    for name, total_s in sorted(after.items()):
        own_s = touching_s if "MainThread" in name else 0.0  # the thread that calls _consume()
        us = 1e6 * (total_s - before.get(name, 0.0) - own_s) / batches  # 0.0: started during the measurement
        if us >= MIN_US:
            click.echo(f"{us:>9,.0f}  {name}")
    click.echo(f"{faults / batches:>9,.0f}  page faults per batch at the client")


def _faults() -> int:
    """Return the number of this process's minor page faults so far: pages mapped without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _consume(loader: Loader, seconds: float) -> tuple[int, float, float]:
    """Consume for ``seconds``; return batches, CPU seconds of touching them, and wall seconds."""
    stream = loader.all_epochs()
    batches, touching_s, start_s = 0, 0.0, time.perf_counter()
    while (took_s := time.perf_counter() - start_s) < seconds:
        batch = next(stream)
        # CPU time of this thread, as in spent_s(), which it is subtracted from.
        before_s = time.thread_time()
        touch(batch.images)
        touching_s += time.thread_time() - before_s
        del batch  # frees its slot before the next batch is asked for
        batches += 1
    return batches, touching_s, took_s


if __name__ == "__main__":
    main()
