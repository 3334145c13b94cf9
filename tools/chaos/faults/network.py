"""Faults of the links between clients and nodes, and of the name that stands for the nodes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.chaos.arena import Arena
from tools.chaos.faults.fault import Effect, victim
from tools.chaos.node import ChaosNode, Part


def cut_link(arena: Arena, rng: Random) -> Effect | None:
    """Reset all connections of a link and refuse new ones."""
    node = victim(arena, rng, Part.LINK)
    if node is None:
        return None
    # Coroutines of a link run in the loop's thread, which owns its connections; do() waits for the result.
    connections = arena.links.do(node.link.cut())
    return _held(node, lambda: arena.links.do(node.link.listen()), lambda: connections > 0)


def cut_lane(arena: Arena, rng: Random) -> Effect | None:
    """Reset one of several connections of a link."""
    node = victim(arena, rng, Part.LINK)
    if node is None:
        return None
    was_cut = arena.links.do(node.link.cut_one(rng.getrandbits(16)))
    return Effect(lambda: was_cut) if was_cut else None


def hold_link(arena: Arena, rng: Random) -> Effect | None:
    """Hold all bytes of a link."""
    node = victim(arena, rng, Part.LINK)
    if node is None:
        return None
    before = node.link.held_bytes
    arena.links.do(node.link.hold())
    return _held(node, lambda: arena.links.do(node.link.release()), lambda: node.link.held_bytes > before)


def half_open_link(arena: Arena, rng: Random) -> Effect | None:
    """End a link's connections at the node's side only."""
    node = victim(arena, rng, Part.LINK)
    if node is None:
        return None
    connections = arena.links.do(node.link.leave_half_open())
    return _held(node, lambda: arena.links.do(node.link.end_half_open()), lambda: connections > 0)


def delay_link(arena: Arena, rng: Random) -> Effect | None:
    """Delay every byte of a link."""
    node = victim(arena, rng, Part.LINK)
    if node is None:
        return None
    before = node.link.delayed_bytes
    node.link.delay_s = rng.uniform(0.02, 0.4)  # a plain number, which the loop's thread reads for each chunk

    def repair() -> None:
        node.link.delay_s = 0.0

    return _held(node, repair, lambda: node.link.delayed_bytes > before)


def _held(node: ChaosNode, repair: Callable[[], object], acted: Callable[[], bool]) -> Effect:
    """Mark a node's link as held by a fault; the end repairs it and removes the mark."""
    node.hold(Part.LINK)  # apart from the processes: a link may fail while its node is stopped

    def end() -> bool:
        seen = acted()  # before the repair: nothing after it is the fault's doing
        repair()
        node.let_go(Part.LINK)
        return seen

    return Effect(end)


def hide_address(arena: Arena, rng: Random) -> Effect | None:
    """Leave a running node's address out of the name."""
    named = [node.link.host for node in arena.nodes if node.runs and node.link.host not in arena.names.hidden]
    if len(named) < 2:  # at least one address stays
        return None
    host = rng.choice(named)
    arena.names.hide(host)
    return _asked(arena, lambda: arena.names.reveal(host))


def fail_names(arena: Arena, _rng: Random) -> Effect | None:
    """Fail every look-up of the name."""
    if arena.names.failing:  # one name server: a second failure would end with the first
        return None
    arena.names.fail()
    return _asked(arena, arena.names.recover)


def _asked(arena: Arena, repair: Callable[[], None]) -> Effect:
    """Count a fault of the name only if a client looked the name up meanwhile."""
    before = arena.names.asked

    def end() -> bool:
        seen = arena.names.asked > before
        repair()
        return seen

    return Effect(end)
