"""Faults of a client: it is killed, or interrupted again and again."""

from __future__ import annotations

import threading
from random import Random
from typing import Final

from tools.chaos.arena import Arena
from tools.chaos.faults.fault import Effect

INTERRUPT_S: Final = (0.001, 0.01)
"""Time between two signals of a storm: about that of a batch, so that they meet each moment of ``next()``."""


def kill_client(arena: Arena, rng: Random) -> Effect | None:
    """Kill a client; start it again at the end."""
    client = rng.choice(arena.clients)
    # A saved state first, so that the restart is a resume.
    if not client.batches() or client.killed or client.interrupted:
        return None
    arena.note_segments()  # the client's are gone from /proc once it is killed
    if not client.kill():
        return None

    def end() -> bool:
        client.start()
        return True

    return Effect(end)


def interrupt_client(arena: Arena, rng: Random) -> Effect | None:
    """Send a client a storm of SIGINT, each of which it catches."""
    client = rng.choice(arena.clients)
    before = client.interrupts()  # None: it is not yet in its loop, and a signal would end it
    if before is None or client.killed or client.interrupted:
        return None
    client.interrupted = True
    over, pauses = threading.Event(), Random(rng.getrandbits(32))  # noqa: S311 - pauses need not be hard to guess

    def storm() -> None:
        while not over.wait(pauses.uniform(*INTERRUPT_S)):
            client.interrupt()

    thread = threading.Thread(target=storm, name="interrupts", daemon=True)
    thread.start()

    def end() -> bool:
        over.set()
        thread.join()
        client.interrupted = False
        now = client.interrupts()
        return now is not None and now > before

    return Effect(end)
