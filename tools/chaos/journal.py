"""Journal and saved state of a client under test: the record of what its training loop received.

The client appends an entry to the journal after each batch and saves its state after that. Entries beyond the saved state
belong to batches that no checkpoint remembers: a restarted client removes them and receives those batches again. So the
journal at the end lists what a training run restored from its checkpoints has seen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from loader_service import Batch, EpochAccount
from tools.sample_dataset import digest


class JournalEntry(msgspec.Struct, frozen=True):
    """One received batch: its place in the epoch's order, its record numbers, and a digest of all its arrays."""

    epoch: int
    start: int
    ids: list[int]
    digest: str

    @classmethod
    def of(cls, batch: Batch) -> JournalEntry:
        """Describe a batch."""
        # Copies: the batch's arrays are views of a slot.
        return cls(batch.epoch, batch.start, batch.ids.tolist(), digest(batch))


class Saved(msgspec.Struct, frozen=True):
    """The state that survives a client.

    Fields:
        state: the loader's.
        lines: number of journal entries that belong to it.
        accounts: the account of each epoch so far.
        pid: process that saved it.
        interrupts: interrupts of ``next()`` that this process has caught.
    """

    state: dict[str, Any]
    lines: int
    accounts: list[EpochAccount]
    pid: int
    interrupts: int


def read_journal(folder: Path) -> list[JournalEntry]:
    """Return every entry of a client's journal."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=JournalEntry) for line in lines]


def read_saved(folder: Path) -> Saved | None:
    """Return the state that a client saved last, None if it has saved none yet."""
    try:
        content = (folder / "saved.json").read_bytes()
    except FileNotFoundError:  # killed before its first batch, or not started
        return None
    return msgspec.json.decode(content, type=Saved)


def save(folder: Path, saved: Saved) -> None:
    """Replace the saved state atomically: a client killed here leaves the old state or the new one."""
    fresh = folder / "saved.json.new"
    # No fsync: the faults kill processes, never the machine, and written pages outlive a process.
    fresh.write_bytes(msgspec.json.encode(saved))
    fresh.rename(folder / "saved.json")


def cut_journal(folder: Path, lines: int) -> None:
    """Remove the journal's entries after the first ``lines``."""
    path = folder / "journal.jsonl"
    path.touch()  # a client that has not written any batch yet
    # Also drops a last line that a kill cut short: the state is saved after its line, so it lies beyond `lines`.
    kept = path.read_bytes().splitlines(keepends=True)[:lines]
    os.truncate(path, sum(len(line) for line in kept))
