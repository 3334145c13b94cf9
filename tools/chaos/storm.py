"""A storm of faults: which fault begins when and on which victim, drawn from a seed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Final

import click

from tools.chaos.arena import Arena
from tools.chaos.faults import FAULTS, Effect
from tools.errors import ToolFailed

PACE_S: Final = (0.2, 1.6)
"""Time between the beginnings of two faults. Many faults last longer, so several overlap."""

FIRST_ROUND_S: Final = 60.0
"""Time beyond the requested one until each kind of fault must have acted once."""

PROGRESS_S: Final = 5.0
TICK_S: Final = 0.1


@dataclass
class Active:
    """A fault in progress; ``ends_s`` is a monotonic time, None while its harm is being done."""

    name: str
    effect: Effect
    lasts_s: float
    ends_s: float | None = None


class Storm:
    """Draws faults, begins them and ends them.

    Each kind is injected once, the longest first, before any kind is repeated; then in rounds of random order. A later
    round ends early if no victim is left for the rest of it: there may be no node to lose or to add any more. A fault
    counts once it has ended and was seen to act; a kind that has not acted yet is injected again.

    Args:
        arena: system under test.
        rng: source of all choices.
        names: kinds of faults, keys of FAULTS.

    Fields:
        acted: number of faults of each kind that were seen to act.
        idle: number of faults of each kind that were not.
        seconds: how long the storm has lasted.
    """

    def __init__(self, arena: Arena, rng: Random, names: list[str]) -> None:
        self._arena, self._rng, self._names = arena, rng, names
        # sorted() is stable: faults that last equally long stay in the drawn order.
        self._deck = sorted(rng.sample(names, len(names)), key=lambda name: -FAULTS[name].lasts_s[1])
        self._active: list[Active] = []
        self._clock = threading.Event()  # never set: only its timeout is used
        self._began = 0.0
        self.acted: Counter[str] = Counter()
        self.idle: Counter[str] = Counter()

    @property
    def missing(self) -> list[str]:
        """The kinds that were not seen to act yet."""
        return [name for name in self._names if not self.acted[name]]

    @property
    def seconds(self) -> float:
        """Time since every client trained."""
        return time.monotonic() - self._began

    def begin_one(self, names: list[str]) -> None:
        """Inject the first fault of the deck that is one of ``names`` and finds a victim."""
        if not self._deck:
            self._deck = self._rng.sample(self._names, len(self._names))
        for name in self._deck:
            if name in names and self._begin(name):
                self._deck.remove(name)  # safe during iteration, because the loop ends here
                return
        # The rest of the deck finds no victim. The first round tries it again later, and other kinds meanwhile, which may make
        # victims: a node is added, for instance. Any later round ends here.
        if not self.missing:
            self._deck = []
            return
        for name in self._rng.sample(names, len(names)):
            if name not in self._deck and self._begin(name):
                return

    def _begin(self, name: str) -> bool:
        """Inject a fault; return False if it finds no victim."""
        effect = FAULTS[name].begin(self._arena, self._rng)
        if effect is None:
            return False
        lasts_s = self._rng.uniform(*FAULTS[name].lasts_s)
        # A string times False is empty.
        click.echo(f"{self.seconds:6.1f} s  {name}" + f" for {lasts_s:.1f} s" * (lasts_s > 0))
        self._active.append(Active(name, effect, lasts_s))
        return True

    def end_due(self) -> None:
        """End the faults whose time is over."""
        now = time.monotonic()
        for fault in self._active:
            if fault.ends_s is None and (fault.effect.begun is None or fault.effect.begun.done()):
                # From now, not from before the harm, which may have taken seconds.
                fault.ends_s = now + fault.lasts_s
        due = [fault for fault in self._active if fault.ends_s is not None and fault.ends_s <= now]
        self._active = [fault for fault in self._active if fault not in due]
        for fault in due:
            acted = fault.effect.end()
            (self.acted if acted else self.idle)[fault.name] += 1
            if not self.acted[fault.name]:
                self._deck.insert(0, fault.name)

    def rage(self, seconds: float, faults: int) -> None:
        """Inject faults once every client trains, then wait until all of them have ended.

        Args:
            seconds: shortest time during which faults begin.
            faults: least number of faults that act.

        Raises:
            ToolFailed: a client ended by itself, or a kind of fault never acted.
        """
        while not all(client.batches() for client in self._arena.clients):
            self._arena.check()
            self._clock.wait(TICK_S)
        self._began = next_fault = shown = time.monotonic()  # the clock starts when every client has saved a batch
        while True:
            now = time.monotonic()
            self.end_due()
            self._arena.check()  # a client that ends by itself ends the run at once
            wanted = self._wanted(seconds, faults)
            if not wanted and not self._active and not self._arena.busy:  # what has begun is ended, never cut off
                break
            if wanted and now >= next_fault:
                self._arena.note_segments()  # before the fault: it may kill a process that has some
                self.begin_one(wanted)
                next_fault = now + self._rng.uniform(*PACE_S)
            if now - shown >= PROGRESS_S:
                shown = now
                self._show_progress()
            self._clock.wait(TICK_S)
        self._arena.check()
        if self.missing:
            raise ToolFailed(f"{', '.join(self.missing)}: never seen to act; {self._tried()}.")

    def _wanted(self, seconds: float, faults: int) -> list[str]:
        """Return the kinds of which one may begin now."""
        if self.seconds < seconds or self.acted.total() < faults:
            return self._names
        # Kinds that have not acted yet get more time, but not without end.
        in_progress = {fault.name for fault in self._active}
        late = self.seconds > seconds + FIRST_ROUND_S
        return [] if late else [name for name in self.missing if name not in in_progress]

    def _tried(self) -> str:
        tried = ", ".join(f"{name} {self.idle[name]} times" for name in self.missing if self.idle[name])
        return f"injected without effect: {tried}" if tried else "no victim was found"

    def _show_progress(self) -> None:
        counts = ", ".join(f"{client.name} {client.batches():,} batches" for client in self._arena.clients)
        active = len(self._active)
        click.echo(f"{self.seconds:6.1f} s  {counts}; {self.acted.total()} faults acted so far, {active} are active")
