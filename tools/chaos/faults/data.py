"""Faults of a node's data: its disk damages some records, or loses all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

from tools.chaos import damage
from tools.chaos.arena import Arena
from tools.chaos.faults.fault import Effect, restart, restore, victim

FLIPPED: Final = 20
"""Records of a node that get a flipped bit: enough to meet some of them within seconds."""


def damage_node(arena: Arena, rng: Random) -> Effect | None:
    """Restart a node with flipped bits in some records of its copy of the dataset."""
    numbers = rng.sample(range(damage.count(arena.served)), FLIPPED)
    return _restart(arena, rng, lambda copy: damage.flip_bits(copy, numbers, rng))


def sicken_node(arena: Arena, rng: Random) -> Effect | None:
    """Restart a node whose records are all gone: it refuses everything at once."""
    return _restart(arena, rng, damage.erase)


def _restart(arena: Arena, rng: Random, harm: Callable[[Path], None]) -> Effect | None:
    node = victim(arena, rng, damaging=True)
    if node is None:
        return None

    def alter() -> None:
        damage.copy(arena.served, node.copy)
        harm(node.copy)
        node.unsound = True

    begun = restart(arena, node, alter, lambda: node.start(node.copy))

    def end() -> bool:
        status = arena.status(node)
        restore(arena, node, lambda: shutil.rmtree(node.copy))
        return status is not None and status.bad_samples > 0

    return Effect(end, begun)
