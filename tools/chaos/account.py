"""Results of a run: the journal of each client, epoch by epoch, compared with an undisturbed run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loader_service import EpochAccount, Loader, LocalNode
from tools.chaos.client import BATCH_SIZE
from tools.chaos.journal import JournalEntry, read_journal, read_saved
from tools.errors import ToolFailed

CHECKING_WORKERS: Final = 2


@dataclass(frozen=True)
class EpochResult:
    """One epoch of one client.

    Fields:
        epoch: its number, from 0.
        delivered: positions in the journal.
        lost: positions that the journal lacks.
        twice: positions that the journal has more than once.
        differing: batches that differ from an undisturbed run, in order or in bytes.
        account: the client's ledger of this epoch.
    """

    epoch: int
    delivered: int
    lost: int
    twice: int
    differing: int
    account: EpochAccount

    @property
    def flawless(self) -> bool:
        """True if the epoch equals an undisturbed one and the ledger agrees with the journal."""
        # Two accounts: the journal counts what the loop got, the ledger what the client says that it delivered.
        return not (self.lost or self.twice or self.differing) and self.account.delivered == self.delivered

    @property
    def eventful(self) -> bool:
        """True if the epoch shows a trace of a fault."""
        return bool(self.account.reassigned or self.account.duplicates_refused) or not self.flawless


def undisturbed(data: Path, seed: int, epochs: int) -> tuple[int, dict[int, list[JournalEntry]]]:
    """Return the number of records, and the journal of each epoch as a node and a client without faults write it."""
    entries: dict[int, list[JournalEntry]] = {}
    with (
        LocalNode(data, CHECKING_WORKERS) as node,
        # The same batch size as the clients', because entries are compared batch by batch.
        Loader(
            node.address, batch_size=BATCH_SIZE, seed=seed, epochs=epochs, timeout_s=60, on_bad_sample="substitute"
        ) as loader,
    ):
        for batch in loader.all_epochs():
            # A digest, so a whole run needs no room for pixels.
            entries.setdefault(batch.epoch, []).append(JournalEntry.of(batch))
        return loader.dataset.count, entries


def results(data: Path, seed: int, folder: Path) -> list[EpochResult]:
    """Return the result of each epoch of a client that has finished.

    Raises:
        ToolFailed: it has no journal, or an empty one.
    """
    saved = read_saved(folder)
    journal = read_journal(folder) if saved else []
    if saved is None or not journal:
        raise ToolFailed(f"there is no journal in {folder}: nothing was delivered.")
    epochs = max(entry.epoch for entry in journal) + 1  # a client ends at the end of an epoch
    count, expected = undisturbed(data, seed, epochs)
    accounts = {account.epoch: account for account in saved.accounts}
    return [
        _judge(
            count,
            expected[epoch],
            [entry for entry in journal if entry.epoch == epoch],
            accounts.get(epoch, EpochAccount(epoch, 0)),  # no account: 0 delivered, so not flawless
        )
        for epoch in range(epochs)
    ]


def _judge(count: int, expected: list[JournalEntry], entries: list[JournalEntry], account: EpochAccount) -> EpochResult:
    times = Counter(number for entry in entries for number in entry.ids)  # how often each record number was delivered
    # In order: a batch that is missing makes all later ones of the epoch differ as well.
    pairs = sum(have != need for have, need in zip(entries, expected, strict=False))
    return EpochResult(
        epoch=account.epoch,
        delivered=times.total(),
        lost=count - len(times),  # distinct record numbers: each occurs once in an epoch's order
        twice=times.total() - len(times),
        differing=pairs + abs(len(entries) - len(expected)),  # those beyond the shorter list have no partner
        account=account,
    )
