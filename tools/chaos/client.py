"""A client under test: an epoch loop in a process of its own, which can be killed at any moment and resumes from its state.

SIGINT becomes a KeyboardInterrupt inside ``next()``, as Ctrl-C does in a notebook; the loop catches it and goes on.
"""

from __future__ import annotations

import logging
import os
import select
import signal
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from loader_service import Batch, EpochAccount, Loader
from loader_service.client.protocol import Transport
from tools.chaos import haste
from tools.chaos.journal import JournalEntry, Saved, cut_journal, read_saved, save
from tools.chaos.name_server import answer_from
from tools.errors import ToolFailed
from tools.sample_dataset import digest

BATCH_SIZE: Final = 48  # 400 records, the sample dataset, end in a batch of 16
CONNECTIONS: Final = 2
"""Connections to a node over TCP, whatever this machine's default is: several lanes are part of the test."""

STEP_S: Final = 0.01
"""Time of a training step: short enough that a fault mostly meets slices in work, long enough to leave CPU time to nodes."""

PATIENCE_S: Final = 120.0
"""Every fault is far shorter: a loop without a batch for that long hangs."""


class Signals:
    """The handlers of SIGTERM and SIGINT.

    A handler runs between any two bytecodes of the main thread, so it only sets a flag or raises: a lock in it, such as
    that of a threading.Event, may be held by the very code that it interrupts.

    Fields:
        stopping: True after SIGTERM.
        interruptible: True while SIGINT raises KeyboardInterrupt; the handler resets it, so that one is raised at a time.
        interrupts: interrupts that came out of ``next()``.
    """

    def __init__(self) -> None:
        self.stopping = self.interruptible = False
        self.interrupts = 0
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._interrupt)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _interrupt(self, *_: object) -> None:
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt


class Training:
    """An epoch loop that journals each batch.

    Args:
        loader: its loader.
        folder: folder of its journal and its saved state.
        signals: the process's handlers.
    """

    def __init__(self, loader: Loader, folder: Path, signals: Signals) -> None:
        self._loader, self._folder, self._signals = loader, folder, signals
        saved = read_saved(folder)
        self._lines, self._before = (saved.lines, saved.accounts) if saved else (0, [])
        if saved:
            loader.load_state_dict(saved.state)
        cut_journal(folder, self._lines)  # entries of batches that the saved state does not know come again
        # Unbuffered: a kill loses no entry.
        self._journal = (folder / "journal.jsonl").open("ab", buffering=0)

    def run(self) -> None:
        """Loop over epochs until SIGTERM, then to the end of the epoch.

        Raises:
            ToolFailed: a batch changed while the loop held it.
        """
        signals, ended = self._signals, False
        batches = self._loader.all_epochs()  # goes on with the batch that an exception kept from being returned
        while not ended:
            try:
                signals.interruptible = True
                for batch in batches:
                    # Nothing between next() and this line can be interrupted: CPython runs handlers at calls and jumps.
                    signals.interruptible = False
                    if ended := self._step(batch):
                        break
                    del batch  # its slot returns before next(), which an interrupt may leave at once
                    signals.interruptible = True  # until the next batch is here
            except KeyboardInterrupt:
                signals.interrupts += 1
        self._journal.close()

    def _step(self, batch: Batch) -> bool:
        """Train on a batch and remember it; return whether the loop is over."""
        entry = JournalEntry.of(batch)  # the digest at delivery
        self._compute()
        # A late writer would change the batch while the training step uses it.
        if digest(batch) != entry.digest:
            raise ToolFailed(f"the batch at {batch.start} of epoch {batch.epoch} changed while it was held.")
        # The journal first: a state that is ahead of the journal would skip a batch after a kill between the two.
        self._journal.write(msgspec.json.encode(entry) + b"\n")
        self._lines += 1
        state, accounts = self._loader.state_dict(), _merged(self._before, self._loader)
        save(self._folder, Saved(state, self._lines, accounts, os.getpid(), self._signals.interrupts))
        # Only whole epochs can be compared with an undisturbed run.
        return self._signals.stopping and batch.start + len(batch.ids) == self._loader.dataset.count

    def _compute(self) -> None:
        """Take the time of a training step; an interrupt ends it, so a storm of them meets ``next()`` most of the time."""
        try:
            self._signals.interruptible = True
            select.select([], [], [], STEP_S)  # the time of a step, which a signal's exception ends
            self._signals.interruptible = False
        except KeyboardInterrupt:
            return


def _merged(before: list[EpochAccount], loader: Loader) -> list[EpochAccount]:
    """Add this process's accounts to those of the client's earlier processes."""
    accounts = {account.epoch: account for account in before}
    for now in loader.ledger:
        earlier = accounts.get(now.epoch)
        # `before` is fixed and the loader's ledger counts from this process's start, so nothing is added twice.
        accounts[now.epoch] = earlier.continued(now) if earlier else now
    return sorted(accounts.values(), key=lambda account: account.epoch)


@click.command()
@click.argument("addresses")
@click.argument("transport", type=click.Choice(["auto", "tcp"]))
@click.argument("seed", type=int)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--names", type=click.Path(path_type=Path), help="File that replaces the name server.")
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of the keys; without it, no encryption.")
@click.option("--connections", default=CONNECTIONS, show_default=True, help="TCP connections to a node.")
@click.option("--hurry", is_flag=True, help="Shorten all timeouts; see tools.chaos.haste.")
def main(
    addresses: str,
    transport: Transport,
    seed: int,
    folder: Path,
    names: Path | None,
    keys: Path | None,
    connections: int,
    hurry: bool,
) -> None:
    """Run one client's epoch loop, for `tools.chaos` and the tests of the network."""
    signals = Signals()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    if hurry:
        haste.hurry()
    if names:
        answer_from(names)  # before the loader's first look-up
    options: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "timeout_s": PATIENCE_S,
        "connections": connections,
        "on_bad_sample": "substitute",
    }
    if keys is None:
        options["insecure"] = True
    else:
        options |= {"server_key": keys / "node.key", "client_key": keys / "client.secret"}
    with Loader(addresses, seed=seed, transport=transport, **options) as loader:
        Training(loader, folder, signals).run()


if __name__ == "__main__":
    main()
