"""The merged accounts of a resumed run."""

from __future__ import annotations

from loader_service import EpochAccount
from trainer.run.summary import merge_accounts


def test_an_epoch_left_in_its_middle_is_one_account() -> None:
    """The earlier account expected the whole epoch; all other counts are added."""
    earlier = [EpochAccount(0, 300, 300, 1, 2, 0), EpochAccount(1, 300, 128, 1, 0, 3)]
    later = [EpochAccount(1, 172, 172, 2, 5, 4), EpochAccount(2, 300, 32, 0, 0, 0)]
    assert merge_accounts(earlier, later) == [
        EpochAccount(0, 300, 300, 1, 2, 0),
        EpochAccount(1, 300, 300, 3, 5, 7),
        EpochAccount(2, 300, 32, 0, 0, 0),
    ]


def test_an_unbroken_run_is_what_the_loader_says() -> None:
    """The accounts of an uninterrupted run are the loader's."""
    assert merge_accounts([], [EpochAccount(0, 300, 300, 0, 0, 0)]) == [EpochAccount(0, 300, 300, 0, 0, 0)]
