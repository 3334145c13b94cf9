"""The accounts of a run that was made in several pieces."""

from __future__ import annotations

from trainer.run.ledger import Account, merge_accounts


def test_an_epoch_left_in_its_middle_is_one_account() -> None:
    """The first part expected all of it; what came later is added, in every column."""
    earlier = [Account(0, 300, 300, 1, 2, 0), Account(1, 300, 128, 1, 0, 3)]
    later = [Account(1, 172, 172, 2, 5, 4), Account(2, 300, 32, 0, 0, 0)]
    assert merge_accounts(earlier, later) == [
        Account(0, 300, 300, 1, 2, 0),
        Account(1, 300, 300, 3, 5, 7),
        Account(2, 300, 32, 0, 0, 0),
    ]


def test_an_unbroken_run_is_what_the_loader_says() -> None:
    """Nothing to merge."""
    assert merge_accounts([], [Account(0, 300, 300, 0, 0, 0)]) == [Account(0, 300, 300, 0, 0, 0)]
