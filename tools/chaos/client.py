"""A client under test: an epoch loop in a process of its own, which can be killed at any moment and resumes from its state."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from loader_service import EpochAccount, Loader
from loader_service.client.protocol import Transport
from tools.chaos.journal import JournalEntry, Saved, cut_journal, read_saved, save
from tools.chaos.name_server import answer_from
from tools.errors import ToolFailed
from tools.sample_dataset import digest

BATCH_SIZE: Final = 48  # 400 records, the sample dataset, end in a batch of 16
CONNECTIONS: Final = 2
"""Connections to a node over TCP, whatever this machine's default is: several lanes are part of the test."""

STEP_S: Final = 0.02
"""Time of a training step: short enough to keep the nodes busy, long enough to leave CPU time to them."""

PATIENCE_S: Final = 120.0
"""Every fault is far shorter: a loop without a batch for that long hangs."""


def _merged(before: list[EpochAccount], loader: Loader) -> list[EpochAccount]:
    """Add this process's accounts to those of the client's earlier processes."""
    accounts = {account.epoch: account for account in before}
    for now in loader.ledger:
        earlier = accounts.get(now.epoch)
        # `before` is fixed and the loader's ledger counts from this process's start, so nothing is added twice.
        accounts[now.epoch] = earlier.continued(now) if earlier else now
    return sorted(accounts.values(), key=lambda account: account.epoch)


def train(addresses: str, transport: Transport, seed: int, folder: Path, keys: Path | None) -> None:
    """Loop over epochs until SIGTERM, then to the end of the epoch.

    Raises:
        ToolFailed: a batch changed while the loop held it.
    """
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # the loop goes on to the epoch's end
    saved = read_saved(folder)
    lines, before = (saved.lines, saved.accounts) if saved else (0, [])
    cut_journal(folder, lines)  # entries of batches that the saved state does not know come again
    options: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "timeout_s": PATIENCE_S,
        "connections": CONNECTIONS,
    }
    if keys is None:
        options |= {"insecure": True}
    else:
        options |= {"server_key": keys / "node.key", "client_key": keys / "client.secret"}
    with (
        Loader(addresses, seed=seed, transport=transport, **options) as loader,
        (folder / "journal.jsonl").open("ab", buffering=0) as journal,  # unbuffered: a kill loses no entry
    ):
        if saved:
            loader.load_state_dict(saved.state)
        for batch in loader.all_epochs():
            entry = JournalEntry.of(batch)  # the digest at delivery
            stopping.wait(STEP_S)
            # A late writer would change the batch while the training step uses it.
            if digest(batch) != entry.digest:
                raise ToolFailed(f"the batch at {batch.start} of epoch {batch.epoch} changed while it was held.")
            # The journal first: a state that is ahead of the journal would skip a batch after a kill between the two.
            journal.write(msgspec.json.encode(entry) + b"\n")
            lines += 1
            save(folder, Saved(loader.state_dict(), lines, _merged(before, loader)))
            # Only whole epochs can be compared with an undisturbed run.
            if stopping.is_set() and batch.start + len(batch.ids) == loader.dataset.count:
                return


@click.command()
@click.argument("addresses")
@click.argument("transport", type=click.Choice(["auto", "tcp"]))
@click.argument("seed", type=int)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--names", type=click.Path(path_type=Path), help="File that replaces the name server.")
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of the keys; without it, no encryption.")
def main(addresses: str, transport: Transport, seed: int, folder: Path, names: Path | None, keys: Path | None) -> None:
    """Run one client's epoch loop, for `tools.chaos` and the tests of the network."""
    if names:
        answer_from(names)  # before the loader's first look-up
    train(addresses, transport, seed, folder, keys)


if __name__ == "__main__":
    main()
