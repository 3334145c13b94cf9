"""Results of a training run, read from what the trainer wrote or printed, and the check that every sample was seen once."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from tools.errors import ToolFailed
from trainer.run.summary import Summary

T = TypeVar("T")


class Evaluation(msgspec.Struct, frozen=True):
    """The part of ``trainer evaluate --json`` that tools show.

    Fields:
        images: number of validation images.
        top1_error, top5_error: shares of them, 0 to 1.
    """

    images: int
    top1_error: float
    top5_error: float


def decode(printed: str | bytes, kind: type[T], where: str) -> T:
    """Decode JSON as ``kind``; ``where`` names its source in the error.

    Raises:
        ToolFailed: it is not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(printed, type=kind)
    except msgspec.MsgspecError as error:
        raise ToolFailed(f"{where} is not what this tool expects: {error}.") from error


def read_summary(path: Path) -> Summary:
    """Read a run's summary.json.

    Raises:
        ToolFailed: it cannot be read, or is no summary.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ToolFailed(f"the training left no {path} that can be read: {error.strerror}.") from error
    return decode(content, Summary, str(path))


def check(summary: Summary) -> None:
    """Check that a run has finished and that each sample of each epoch was delivered exactly once.

    Raises:
        ToolFailed: it has not, or an epoch has too few samples or too many.
    """
    if not summary.finished:
        raise ToolFailed("the training was stopped before its last epoch.")
    if not summary.ledger:  # an empty list would pass the check below
        raise ToolFailed("the training has no account of any epoch.")
    for account in summary.ledger:
        if account.delivered != account.expected:  # either way: a sample seen twice is as wrong as one missed
            raise ToolFailed(
                f"epoch {account.epoch} delivered {account.delivered} of {account.expected} samples: the ledger is broken."
            )


def ledger_line(summary: Summary) -> str:
    """Return the accounts of all epochs, summed, as one line for people."""
    delivered = sum(account.delivered for account in summary.ledger)
    expected = sum(account.expected for account in summary.ledger)
    refused = sum(account.duplicates_refused for account in summary.ledger)
    reassigned = sum(account.reassigned for account in summary.ledger)
    return (
        f"{delivered:,} of {expected:,} samples in {len(summary.ledger)} epochs "
        f"({refused} duplicates refused, {reassigned} slices asked for again)"
    )
