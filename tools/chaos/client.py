"""An epoch loop in a process of its own, which may be killed at any moment and goes on from its saved state.

After each batch the journal gets a line, and then the state is saved, both in this order and the latter by renaming.
What the journal holds beyond the saved state was delivered to nobody who remembers: it is cut off when the loop goes on,
and those batches are delivered again. So what the journal holds in the end is what a training that was restored from
its checkpoints has seen.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from loader_service import Batch, EpochAccount, Loader
from loader_service.client.protocol import Transport
from tools.chaos.names import answer_from
from tools.errors import ToolFailed

BATCH_SIZE: Final = 48
CONNECTIONS: Final = 2
"""With a node that slices come from in frames, whatever the default is on this machine."""

STEP_S: Final = 0.02
"""What a training step would take: short enough for the nodes to be busy, long enough for other things to run here."""

PATIENCE_S: Final = 120.0
"""No fault lasts as long by far: a loop without a batch for that long hangs."""

FOR_EVER: Final = 2**31


class Line(msgspec.Struct, frozen=True):
    """The journal's line for one batch: its place, its ids, and a digest of all its arrays."""

    epoch: int
    start: int
    ids: list[int]
    digest: str


class Saved(msgspec.Struct, frozen=True):
    """What outlives a client: the loader's state, how many lines of the journal belong to it, the accounts."""

    state: dict[str, Any]
    lines: int
    accounts: list[EpochAccount]


def digest(batch: Batch) -> str:
    """Of every byte of a batch's arrays."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in (batch.images, batch.labels, batch.ids, batch.sources, batch.draws):
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def line_of(batch: Batch) -> Line:
    """What the journal has of a batch."""
    return Line(batch.epoch, batch.start, batch.ids.tolist(), digest(batch))


def read_journal(folder: Path) -> list[Line]:
    """Every line of a client's journal."""
    return [msgspec.json.decode(line, type=Line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


def read_saved(folder: Path) -> Saved | None:
    """What a client saved last; None if it had saved nothing yet."""
    try:
        content = (folder / "saved.json").read_bytes()
    except FileNotFoundError:
        return None
    return msgspec.json.decode(content, type=Saved)


def _save(folder: Path, saved: Saved) -> None:
    beside = folder / "saved.json.new"
    beside.write_bytes(msgspec.json.encode(saved))
    beside.rename(folder / "saved.json")


def _cut_journal(folder: Path, lines: int) -> None:
    path = folder / "journal.jsonl"
    path.touch()
    kept = path.read_bytes().splitlines(keepends=True)[:lines]
    os.truncate(path, sum(len(line) for line in kept))


def _merged(before: list[EpochAccount], loader: Loader) -> list[EpochAccount]:
    """The accounts of earlier lives, with those of this one added to them."""
    accounts = {account.epoch: account for account in before}
    for now in loader.ledger:
        earlier = accounts.get(now.epoch)
        accounts[now.epoch] = earlier.continued(now) if earlier else now
    return sorted(accounts.values(), key=lambda account: account.epoch)


def train(addresses: str, transport: Transport, seed: int, folder: Path, keys: Path | None) -> None:
    """Loop over epochs until SIGTERM, and then to the epoch's end.

    Raises:
        ToolFailed: a batch changed while it was held.
    """
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    saved = read_saved(folder)
    lines, before = (saved.lines, saved.accounts) if saved else (0, [])
    _cut_journal(folder, lines)
    options: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "epochs": FOR_EVER,
        "timeout_s": PATIENCE_S,
        "connections": CONNECTIONS,
    }
    if keys:
        options |= {"server_key": keys / "node.key", "client_key": keys / "client.secret"}
    with (
        Loader(addresses, seed=seed, transport=transport, **options) as loader,
        (folder / "journal.jsonl").open("ab", buffering=0) as journal,
    ):
        if saved:
            loader.load_state_dict(saved.state)
        for batch in loader:
            line = line_of(batch)
            stopping.wait(STEP_S)
            if digest(batch) != line.digest:
                raise ToolFailed(f"the batch at {batch.start} of epoch {batch.epoch} changed while it was held.")
            journal.write(msgspec.json.encode(line) + b"\n")
            lines += 1
            _save(folder, Saved(loader.state_dict(), lines, _merged(before, loader)))
            if stopping.is_set() and batch.start + len(batch.ids) == loader.dataset.count:
                return


@click.command()
@click.argument("addresses")
@click.argument("transport", type=click.Choice(["auto", "tcp"]))
@click.argument("seed", type=int)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--names", type=click.Path(path_type=Path), help="The file that stands for the name server.")
@click.option("--keys", type=click.Path(path_type=Path), help="The folder with the keys, where there are any.")
def main(addresses: str, transport: Transport, seed: int, folder: Path, names: Path | None, keys: Path | None) -> None:
    """One client's epoch loop: not for people, but for `tools.chaos` and the tests of the network."""
    if names:
        answer_from(names)
    train(addresses, transport, seed, folder, keys)


if __name__ == "__main__":
    main()
