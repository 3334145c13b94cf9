"""A client of a soak: it reads batches as fast as they come, and checks that each epoch has every sample once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from loader_service import Loader
from loader_service.cli.job import CONTEXT, Job
from loader_service.client.protocol import Transport
from loader_service.wire.shm import Segment
from tools.errors import ToolFailed

BATCH_SIZE: Final = 16
READY: Final = "ready"
"""The line that a client prints after its first batch."""

PATIENCE_S: Final = 60.0

LEAK_BYTES: Final = 8192
"""Size of a planted leak of each kind, per batch."""

LEAK_EVERY: Final = 64
"""Batches between two leaks of shared memory, which has whole pages only."""


def counters(path: Path) -> npt.NDArray[np.int64]:
    """Return (clients,) int64 in the pages of a file, which all processes of a run share: the batches of each client."""
    return np.memmap(path, np.int64, "r+")


def read(
    address: str,
    transport: Transport,
    keys: Path,
    counts: npt.NDArray[np.int64],
    number: int,
    batches: int,
    loaders: int,
    *,
    leak: bool = False,
) -> None:
    """Read batches until all clients together have read enough.

    After its first batch it prints a line and waits for one, so that all clients begin together.

    Args:
        address: the node's address.
        transport: ``shm`` or ``tcp``.
        keys: folder of the keys.
        counts: see :func:`counters`; this client counts its batches in element ``number``.
        number: see above.
        batches: batches of all clients together.
        loaders: loaders that a client opens, one after the other, for about as many batches each.
        leak: whether to leak memory and shared memory on purpose.

    Raises:
        ToolFailed: an epoch has a sample twice, or lacks one.
    """
    leaked: list[object] = []
    each = -(-batches // (len(counts) * loaders))  # ceil
    while counts.sum() < batches:
        with Loader(
            address,
            transport=transport,
            batch_size=BATCH_SIZE,
            timeout_s=PATIENCE_S,
            server_key=keys / "node.key",
            client_key=keys / "client.secret",
        ) as loader:
            records = loader.dataset.count
            seen, goal = np.zeros(records, np.int64), int(counts[number]) + each
            for batch in loader.all_epochs():
                seen[batch.ids] += 1
                if batch.start + len(batch.ids) == records:
                    if not (seen == 1).all():
                        raise ToolFailed(f"epoch {batch.epoch} over {transport} has not every sample once.")
                    seen[:] = 0
                if leak:
                    leaked.append(bytes([1]) * LEAK_BYTES)
                    if counts[number] % LEAK_EVERY == 0:
                        leaked.append(Segment.create(LEAK_EVERY * LEAK_BYTES, 1))
                counts[number] += 1
                if counts[number] == 1:
                    click.echo(READY)
                    sys.stdin.readline()
                if counts[number] >= goal or counts.sum() >= batches:
                    break


@click.command(cls=Job, context_settings=CONTEXT)
@click.argument("address")
@click.argument("transport", type=click.Choice(["shm", "tcp"]))
@click.argument("keys", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("number", type=int)
@click.argument("batches", type=int)
@click.argument("loaders", type=int)
@click.option("--leak", is_flag=True)
def main(
    address: str, transport: Transport, keys: Path, file: Path, number: int, batches: int, loaders: int, leak: bool
) -> None:
    """Read as one client of a soak, for ``tools.chaos.soak``."""
    read(address, transport, keys, counters(file), number, batches, loaders, leak=leak)


if __name__ == "__main__":
    main(prog_name="python -m tools.chaos.soak.reader")
