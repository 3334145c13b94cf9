"""Records that no node can read: how many may be replaced, and which were."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from loader_service.errors import RecordError, TooManyBadRecords

log = logging.getLogger("loader_service.client")


@dataclass(frozen=True)
class Quarantined:
    """A record that no node can read, the file that it was made from (empty if unknown), and why."""

    record: int
    source: str
    reason: str


class Quarantine:
    """The bad records that others take the place of.

    Args:
        max_bad: how many may be replaced; None stops at the first.

    Fields:
        records: those found so far.
    """

    def __init__(self, max_bad: int | None) -> None:
        self._max_bad = max_bad
        self.records: list[Quarantined] = []

    def take(self, error: RecordError, known: int) -> None:
        """Replace one more record from now on.

        Args:
            error: what is wrong with it.
            known: how many were bad before it, those of the state that a run resumed from included.

        Raises:
            RecordError: none may be replaced.
            TooManyBadRecords: this one is more than may be.
        """
        if self._max_bad is None:
            raise error
        self.records.append(Quarantined(error.record, error.source, error.reason))
        log.warning("%s Another takes its place.", error)
        if known + 1 > self._max_bad:
            raise TooManyBadRecords(known + 1, self._max_bad, str(error))
