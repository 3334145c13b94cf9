"""A storm of faults: which fault begins when and on which victim, drawn from a seed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from random import Random
from typing import Final

import click

from tools.chaos.arena import Arena
from tools.chaos.faults import FAULTS, Undo
from tools.errors import ToolFailed

PACE_S: Final = (0.3, 2.0)
"""Time between the beginnings of two faults. Most faults last longer, so several overlap."""

FIRST_ROUND_S: Final = 30.0
"""Time beyond the requested one until each kind of fault must have been injected once."""

PROGRESS_S: Final = 5.0
TICK_S: Final = 0.1


class Storm:
    """Draws faults, begins them and ends them.

    Each kind is injected once, the longest first, before any kind is repeated; then in rounds of random order. A later
    round ends early if no victim is left for the rest of it: there may be no node to lose or to add any more.

    Args:
        arena: system under test.
        rng: source of all choices.
        names: kinds of faults, keys of FAULTS.

    Fields:
        injected: number of injections of each kind.
    """

    def __init__(self, arena: Arena, rng: Random, names: list[str]) -> None:
        self._arena, self._rng, self._names = arena, rng, names
        self._began_s = time.monotonic()
        # sorted() is stable: faults that last equally long stay in the drawn order.
        self._deck = sorted(rng.sample(names, len(names)), key=lambda name: -FAULTS[name].lasts_s[1])
        self._undos: list[tuple[float, Undo]] = []
        self.injected: Counter[str] = Counter()

    @property
    def missing(self) -> list[str]:
        """The kinds that were not injected yet."""
        return [name for name in self._names if not self.injected[name]]

    @property
    def active(self) -> int:
        """The number of faults that have begun and not ended."""
        return len(self._undos)

    def begin_one(self) -> None:
        """Inject the first fault of the deck that finds a victim."""
        if not self._deck:
            self._deck = self._rng.sample(self._names, len(self._names))
        for name in self._deck:
            undo = FAULTS[name].begin(self._arena, self._rng)
            if undo is not None:
                lasts_s = self._rng.uniform(*FAULTS[name].lasts_s)
                passed_s = time.monotonic() - self._began_s
                # A string times False is empty.
                click.echo(f"{passed_s:6.1f} s  {name}" + f" for {lasts_s:.1f} s" * (lasts_s > 0))
                # From now, not from before begin(), which may take a second.
                self._undos.append((time.monotonic() + lasts_s, undo))
                self._deck.remove(name)  # safe during iteration, because the loop ends here
                self.injected[name] += 1
                return
        # The rest of the deck finds no victim. The first round tries it again later; any later round ends here.
        if not self.missing:
            self._deck = []

    def end_due(self) -> None:
        """End the faults whose time is over."""
        now = time.monotonic()
        due = [undo for at, undo in self._undos if at <= now]
        self._undos = [(at, undo) for at, undo in self._undos if at > now]
        for undo in due:
            undo()

    def rage(self, seconds: float) -> None:
        """Inject faults for ``seconds`` once every client trains, then wait until all of them have ended.

        Raises:
            ToolFailed: a client ended by itself, or a kind of fault found no victim.
        """
        clock = threading.Event()  # never set: only its timeout is used
        while not all(client.batches() for client in self._arena.clients):
            self._arena.check()
            clock.wait(TICK_S)
        began = next_fault = shown = time.monotonic()  # the clock starts when every client has saved a batch
        while True:
            now = time.monotonic()
            self.end_due()
            self._arena.check()  # a client that ends by itself ends the run at once
            # Kinds that found no victim yet get more time, but not without end.
            over = now - began > seconds and (not self.missing or now - began > seconds + FIRST_ROUND_S)
            if over and not self.active:  # faults that have begun are ended, never cut off
                break
            if not over and now >= next_fault:
                self._arena.note_segments()  # before the fault: it may kill a process that has some
                self.begin_one()
                next_fault = now + self._rng.uniform(*PACE_S)
            if now - shown >= PROGRESS_S:
                shown = now
                self._show_progress(now - began)
            clock.wait(TICK_S)
        if self.missing:
            raise ToolFailed(f"{', '.join(self.missing)}: not injected, because no victim was found.")

    def _show_progress(self, passed_s: float) -> None:
        counts = ", ".join(f"{client.name} {client.batches():,} batches" for client in self._arena.clients)
        click.echo(f"{passed_s:6.1f} s  {counts}; {self.injected.total()} faults so far, {self.active} active")
