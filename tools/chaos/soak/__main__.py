"""`make soak`: 200,000 batches from one node, by shared memory and by TCP, while memory stays where it is.

A client of each transport reads small batches as fast as they come, epoch after epoch, and opens a new loader now and then.
The memory of every process and the shared memory are measured all along. At 10 % of the run everything has been allocated
that a run needs; whatever differs by more than 2 % at 90 % is not flat, and the exit code is 1.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from loader_service import LocalNode
from loader_service.cli.job import CONTEXT, Job
from loader_service.client.protocol import Transport
from loader_service.wire.auth import generate
from loader_service.wire.shm import DIRECTORY
from tools.chaos import processes, record
from tools.chaos.soak.reader import READY, counters
from tools.errors import ToolFailed
from tools.sample_dataset import given_or_made

BATCHES: Final = 200_000
LOADERS: Final = 20
"""Loaders that a client opens, one after the other: what a loader leaves behind shows, too."""

RECORDS: Final = 4_000
SIDE_PX: Final = 32
"""Small pictures: what grows with each batch shows by the number of batches, whatever their size."""

WORKERS: Final = 2
TRANSPORTS: Final[tuple[Transport, ...]] = ("shm", "tcp")
END_S: Final = 30.0
"""Timeout for the clients to end after the last batch."""

SAMPLES: Final = 1_000
"""Measurements in a run, spread evenly over its batches."""

LOOK_S: Final = 0.02
PROGRESS_S: Final = 10.0

BEGIN: Final = 0.10
END: Final = 0.90
WINDOW: Final = 0.025
"""The two places in the run that are compared, and how far around each samples count, as shares of the run. A window is as
long as the life of a loader, so its median is of the same mixture at both places."""

TOLERANCE: Final = 0.02
"""Growth, or shrinking, that still counts as flat. A run of seconds is not warm at 10 % and needs more."""


@dataclass(frozen=True)
class Sample:
    """One measurement: the share of the run, 0 to 1, and bytes by name."""

    share: float
    sizes: dict[str, int]


@dataclass(frozen=True)
class Verdict:
    """A size at BEGIN and at END of a run.

    Fields:
        name: what was measured.
        began, ended: medians around the two places, in bytes.
        most: its largest sample of the whole run, in bytes.
        tolerance: growth, or shrinking, that still counts as flat.
    """

    name: str
    began: float
    ended: float
    most: int
    tolerance: float = TOLERANCE

    @property
    def drift(self) -> float:
        """Growth as a share of the size at BEGIN."""
        return self.ended / self.began - 1 if self.began else float(self.ended > 0)

    @property
    def flat(self) -> bool:
        """True if it has neither grown nor shrunk."""
        return abs(self.drift) <= self.tolerance

    @property
    def row(self) -> tuple[str, ...]:
        """Its line in a table, sizes in MiB."""
        sizes = (f"{size / 2**20:.2f}" for size in (self.began, self.ended, self.most))
        return (self.name, *sizes, f"{self.drift:+.2%}", "flat" if self.flat else "NOT FLAT")


HEADER: Final = ("memory of", "MiB at 10 %", "MiB at 90 %", "most", "drift", "")


def judge(samples: Sequence[Sample], tolerance: float = TOLERANCE) -> list[Verdict]:
    """Compare each size at BEGIN and END of a run.

    Args:
        samples: the measurements, in their order.
        tolerance: growth, or shrinking, that still counts as flat.

    Raises:
        ToolFailed: there is no sample around one of these places.
    """

    def around(place: float) -> list[Sample]:
        found = [sample for sample in samples if abs(sample.share - place) <= WINDOW]
        if not found:
            raise ToolFailed(f"nothing was measured at {place:.0%} of the run: it was too short.")
        return found

    began, ended = around(BEGIN), around(END)
    return [
        Verdict(
            name,
            statistics.median(sample.sizes[name] for sample in began),
            statistics.median(sample.sizes[name] for sample in ended),
            max(sample.sizes[name] for sample in samples),
            tolerance,
        )
        for name in samples[0].sizes
    ]


@dataclass
class Soak:
    """The processes of a run, and what was measured of them.

    Fields:
        node: the node.
        clients: the client of each transport.
        counts: (clients,) int64 in shared pages: batches that each client has read.
        batches: batches that they shall read together.
        samples: all measurements.
    """

    node: LocalNode
    clients: dict[Transport, subprocess.Popen[str]]
    counts: npt.NDArray[np.int64]
    batches: int
    samples: list[Sample] = field(default_factory=list)

    def measure(self, share: float) -> None:
        """Take a sample at this share of the run."""
        sizes = {f"client over {name}": processes.rss_bytes(client.pid) for name, client in self.clients.items()}
        sizes["dispatcher"] = processes.rss_bytes(self.node.pid)
        family = [process.pid for process in processes.in_session(self.node.pid) if process.pid != self.node.pid]
        sizes["fork server and workers"] = sum(processes.rss_bytes(pid) for pid in family)
        room = os.statvfs(DIRECTORY)
        sizes[f"{DIRECTORY} in use"] = (room.f_blocks - room.f_bfree) * room.f_frsize
        self.samples.append(Sample(share, sizes))

    def run(self) -> None:
        """Let the clients begin, and measure until they have read all batches.

        Raises:
            ToolFailed: a client ended too early.
        """
        for name, client in self.clients.items():
            assert client.stdout is not None
            if client.stdout.readline().strip() != READY:
                raise ToolFailed(f"the client over {name} ended before its first batch.")
        for client in self.clients.values():
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        clock = threading.Event()  # never set: only its timeout is used
        shown, before, due = time.monotonic(), 0, 0.0
        while (total := int(self.counts.sum())) < self.batches:
            for name, client in self.clients.items():
                if client.poll() is not None:
                    raise ToolFailed(f"the client over {name} ended early, with exit code {client.returncode}.")
            if (share := total / self.batches) >= due:
                self.measure(share)
                due = share + 1 / SAMPLES
            if (passed_s := time.monotonic() - shown) >= PROGRESS_S:
                click.echo(f"{total:9,} of {self.batches:,} batches, {(total - before) / passed_s:,.0f}/s")
                shown, before = time.monotonic(), total
            clock.wait(LOOK_S)
        for name, client in self.clients.items():
            try:
                code = client.wait(END_S)
            except subprocess.TimeoutExpired:
                raise ToolFailed(f"the client over {name} did not end within {END_S:.0f} s.") from None
            if code:
                raise ToolFailed(f"the client over {name} ended with exit code {code}.")


@contextmanager
def soaking(data: Path, folder: Path, batches: int, loaders: int, *, leak: bool) -> Iterator[Soak]:
    """Start a node and the clients; end them all, however the block ends."""
    keys, file = folder / "keys", folder / "counts"
    generate(keys)
    file.write_bytes(bytes(8 * len(TRANSPORTS)))
    with ExitStack() as stack:
        log = folder / "node.log"
        node = stack.enter_context(LocalNode(data, WORKERS, bind="tcp://127.0.0.1:*", keys=keys, log=log))
        clients = {}
        for number, transport in enumerate(TRANSPORTS):
            what = (node.address, transport, str(keys), str(file), str(number), str(batches), str(loaders))
            command = [sys.executable, "-m", "tools.chaos.soak.reader", *what, *(["--leak"] if leak else [])]
            clients[transport] = stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            )
            stack.callback(clients[transport].kill)  # before the context waits; no effect on one that has ended
        yield Soak(node, clients, counters(file), batches)


def check(verdicts: Sequence[Verdict], *, own: bool) -> None:
    """Raise ToolFailed if a size is not flat."""
    if rising := [f"{v.name} ({v.drift:+.1%})" for v in verdicts if not v.flat]:
        others = "" if own else f"; other programs' use of {DIRECTORY} counts here, because only root can leave it out"
        raise ToolFailed(f"not flat between {BEGIN:.0%} and {END:.0%} of the run: {', '.join(rising)}{others}.")


def write_record(
    path: Path, command: str, batches: int, loaders: int, seconds: float, verdicts: Sequence[Verdict]
) -> None:
    """Write the document about a run."""
    record.write(
        path,
        "A soak",
        f"A node with {WORKERS} workers served {batches:,} batches in {seconds / 60:.0f} minutes, to one client by shared "
        f"memory and one by TCP with keys, each of which opened {loaders} loaders, one after the other. Every epoch had "
        "each sample once. The table compares resident memory, and what was allocated in /dev/shm, at 10 % and at 90 % "
        f"of the run; up to {verdicts[0].tolerance:.0%} counts as flat.",
        command,
        record.table(HEADER, [verdict.row for verdict in verdicts]),
    )


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--batches", default=BATCHES, show_default=True, help="Batches to read, over both transports together.")
@click.option("--loaders", default=LOADERS, show_default=True, help="Loaders that a client opens, one after the other.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory with train.lmdb to serve.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="build/soak", show_default=True, help="Folder of logs and keys."
)
@click.option("--leak", is_flag=True, help="Leak memory and shared memory on purpose, to see that it is found.")
@click.option("--tolerance", default=TOLERANCE, show_default=True, help="Growth that still counts as flat, as a share.")
@click.option("--record", "document", type=click.Path(path_type=Path), help="Document to write about a flat run.")
def main(
    batches: int, loaders: int, data: Path | None, out: Path, leak: bool, tolerance: float, document: Path | None
) -> None:
    """Read many batches by shared memory and by TCP, and check that memory stays where it is."""
    own = processes.own_shared_memory()
    shutil.rmtree(out, ignore_errors=True)  # keys of an earlier run are never overwritten
    out.mkdir(parents=True)
    start = time.monotonic()
    with (
        given_or_made(data, RECORDS, SIDE_PX) as served,
        soaking(served, out.resolve(), batches, loaders, leak=leak) as soak,
    ):
        soak.run()
    (out / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(sample) + b"\n" for sample in soak.samples))
    verdicts = judge(soak.samples, tolerance)
    table = Table(*HEADER, title=f"{batches:,} batches")
    for verdict in verdicts:
        table.add_row(*verdict.row)
    Console(width=120, highlight=False).print(table)
    check(verdicts, own=own)
    if document:
        command = f"python -m tools.chaos.soak --batches {batches} --loaders {loaders} --record {document}"
        write_record(document, command, batches, loaders, time.monotonic() - start, verdicts)
    click.echo(f"{batches:,} batches: every sample once in each epoch, and memory is flat.")


if __name__ == "__main__":
    main(prog_name="python -m tools.chaos.soak")
