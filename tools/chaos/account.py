"""The account of a run: what each client was given, epoch by epoch, beside what it should have been given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loader_service import EpochAccount, Loader, LocalNode
from tools.chaos.client import BATCH_SIZE, Line, line_of, read_journal, read_saved
from tools.errors import ToolFailed

CHECKING_WORKERS = 2


@dataclass(frozen=True)
class EpochResult:
    """One epoch of one client.

    Fields:
        delivered, lost, twice: positions that its journal has, has not, and has more than once.
        differing: batches that are not those of an undisturbed run, in order or in bytes.
        account: the ledger's own words.
    """

    epoch: int
    delivered: int
    lost: int
    twice: int
    differing: int
    account: EpochAccount

    @property
    def flawless(self) -> bool:
        """Whether the epoch is as if nothing had happened, and the ledger says so too."""
        return not (self.lost or self.twice or self.differing) and self.account.delivered == self.delivered

    @property
    def eventful(self) -> bool:
        """Whether a fault can be seen in it."""
        return bool(self.account.reassigned or self.account.duplicates_refused) or not self.flawless


def undisturbed(data: Path, seed: int, epochs: int) -> tuple[int, dict[int, list[Line]]]:
    """The number of records, and the lines that a journal must have: of a node and a loader that nobody disturbs."""
    lines: dict[int, list[Line]] = {}
    with (
        LocalNode(data, CHECKING_WORKERS) as node,
        Loader(node.address, batch_size=BATCH_SIZE, seed=seed, epochs=epochs, timeout_s=60) as loader,
    ):
        for batch in loader:
            lines.setdefault(batch.epoch, []).append(line_of(batch))
        return loader.dataset.count, lines


def results(data: Path, seed: int, folder: Path) -> list[EpochResult]:
    """What became of each epoch of a client that has finished.

    Raises:
        ToolFailed: it has no journal worth the name.
    """
    saved = read_saved(folder)
    journal = read_journal(folder) if saved else []
    if saved is None or not journal:
        raise ToolFailed(f"there is no journal in {folder}: nothing was delivered at all.")
    epochs = max(line.epoch for line in journal) + 1
    count, expected = undisturbed(data, seed, epochs)
    accounts = {account.epoch: account for account in saved.accounts}
    return [
        _judge(
            count,
            expected[epoch],
            [line for line in journal if line.epoch == epoch],
            accounts.get(epoch, EpochAccount(epoch, 0)),
        )
        for epoch in range(epochs)
    ]


def _judge(count: int, expected: list[Line], lines: list[Line], account: EpochAccount) -> EpochResult:
    times = Counter(number for line in lines for number in line.ids)
    pairs = sum(have != need for have, need in zip(lines, expected, strict=False))
    return EpochResult(
        epoch=account.epoch,
        delivered=times.total(),
        lost=count - len(times),
        twice=times.total() - len(times),
        differing=pairs + abs(len(lines) - len(expected)),
        account=account,
    )
