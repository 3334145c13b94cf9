"""What became of each epoch's samples, over all the pieces that a run was made in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One epoch, by the loader's ledger; counts of samples, but for ``reassigned`` (slices).

    An epoch is whole when ``delivered == expected``: each sample exactly once.
    """

    epoch: int
    expected: int
    delivered: int
    duplicates_refused: int
    reassigned: int
    substituted: int


_COUNTS: Final = len(Account.__struct_fields__) - 1


def merge_accounts(earlier: Sequence[Account], later: Sequence[Account]) -> list[Account]:
    """The accounts of a run that was left and resumed.

    An epoch in both was left in its middle: the earlier part expected all of it, the later what was left.
    """
    merged = {account.epoch: account for account in earlier}
    for account in later:
        first = merged.get(account.epoch)
        merged[account.epoch] = account if first is None else _together(first, account)
    return [merged[epoch] for epoch in sorted(merged)]


def as_numbers(accounts: Sequence[Account], epochs: Sequence[int]) -> list[float]:
    """The counts of ``epochs`` one after the other, zeros where there is no account; the inverse of ``from_numbers``."""
    known = {account.epoch: msgspec.structs.astuple(account)[1:] for account in accounts}
    return [count for epoch in epochs for count in known.get(epoch, (0,) * _COUNTS)]


def from_numbers(everyone: Sequence[Sequence[float]], epochs: Sequence[int]) -> list[Account]:
    """The accounts of ``epochs``, added up over the processes that each had a part of the samples."""
    sums = [int(sum(column)) for column in zip(*everyone, strict=True)]
    counts = [sums[i : i + _COUNTS] for i in range(0, len(sums), _COUNTS)]
    return [Account(epoch, *of_epoch) for epoch, of_epoch in zip(epochs, counts, strict=True) if any(of_epoch)]


def _together(first: Account, rest: Account) -> Account:
    return Account(
        epoch=first.epoch,
        expected=first.expected,
        delivered=first.delivered + rest.delivered,
        duplicates_refused=first.duplicates_refused + rest.duplicates_refused,
        reassigned=first.reassigned + rest.reassigned,
        substituted=first.substituted + rest.substituted,
    )
