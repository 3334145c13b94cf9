"""The faults: how each is caused, on whom, and how it ends.

A fault is begun by a function that chooses its victim with the run's random numbers, does the harm and returns what
undoes it, or None if there was nobody to harm at this moment: then it was not injected, and is not counted.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from loader_service import defaults
from loader_service.client import resolver
from tools.chaos import processes
from tools.chaos.arena import Arena
from tools.chaos.node import Node

Undo = Callable[[], None]
Begin = Callable[[Arena, Random], Undo | None]

LONG_S: Final = (max(defaults.STALL_S, defaults.NODE_SILENT_S) + 1.5, max(defaults.STALL_S, defaults.NODE_SILENT_S) + 4)
"""Longer than anybody's patience: of a node with its workers, and of a client with its nodes."""

SHORT_S: Final = (0.2, 4.0)
LOOK_UPS_S: Final = (resolver.INTERVAL_S + 0.5, 2 * resolver.INTERVAL_S)
"""Longer than between one look-up of a name and the next."""


@dataclass(frozen=True)
class Fault:
    """One kind of failure.

    Fields:
        what: for people.
        lasts_s: between how many seconds; (0, 0) if nothing is to be undone.
        begin: see the module.
    """

    what: str
    lasts_s: tuple[float, float]
    begin: Begin


def _nothing() -> None:
    """What undoes a harm that is done once and for all."""


def _victim(arena: Arena, rng: Random) -> Node | None:
    """A running node whose processes no other fault has to do with."""
    candidates = [node for node in arena.nodes if node.runs and not node.troubled]
    return rng.choice(candidates) if candidates else None


def _free_link(arena: Arena, rng: Random) -> Node | None:
    """A running node whose link no other fault has to do with."""
    candidates = [node for node in arena.nodes if node.runs and not node.link_troubled]
    return rng.choice(candidates) if candidates else None


def _kill_worker(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    workers = node.workers() if node else []
    return _nothing if workers and processes.send([rng.choice(workers)], signal.SIGKILL) else None


def _stop_worker(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    workers = node.workers() if node else []
    return _stop(node, [rng.choice(workers)]) if node and workers else None


def _stop_dispatcher(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    return _stop(node, [node.dispatcher]) if node else None


def _stop_node(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    return _stop(node, node.family()) if node else None


def _stop(node: Node, pids: list[int]) -> Undo | None:
    if not processes.send(pids, signal.SIGSTOP):
        return None
    node.troubled = True

    def undo() -> None:
        processes.send(pids, signal.SIGCONT)  # its node may have killed it meanwhile
        node.troubled = False

    return undo


def _restart_node(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    if node is None:
        return None
    node.kill()
    node.troubled = True

    def undo() -> None:
        node.start()
        node.troubled = False

    return undo


def _lose_node(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    if node is None or sum(other.runs for other in arena.nodes) < 3:  # two are left, at least
        return None
    node.kill()
    node.lost = True
    return _nothing


def _add_node(arena: Arena, rng: Random) -> Undo | None:
    fresh = [node for node in arena.nodes if not node.sessions]
    if not fresh:
        return None
    arena.add(rng.choice(fresh))
    return _nothing


def _cut_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    arena.links.do(node.link.cut())
    return _mending(node, lambda: arena.links.do(node.link.raise_up()))


def _hold_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    arena.links.do(node.link.hold())
    return _mending(node, lambda: arena.links.do(node.link.let_go()))


def _half_open_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    arena.links.do(node.link.leave_half_open())
    return _mending(node, lambda: arena.links.do(node.link.make_whole()))


def _delay_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    node.link.delay_s = rng.uniform(0.02, 0.4)

    def undo() -> None:
        node.link.delay_s = 0.0

    return _mending(node, undo)


def _mending(node: Node, mend: Undo) -> Undo:
    node.link_troubled = True

    def undo() -> None:
        mend()
        node.link_troubled = False

    return undo


def _hide_address(arena: Arena, rng: Random) -> Undo | None:
    named = [node.link.host for node in arena.nodes if node.runs and node.link.host not in arena.names.hidden]
    if len(named) < 2:  # one is left, at least
        return None
    host = rng.choice(named)
    arena.names.hide(host)
    return lambda: arena.names.reveal(host)


def _fail_names(arena: Arena, _rng: Random) -> Undo | None:
    if arena.names.failing:
        return None
    arena.names.fail()
    return arena.names.recover


def _kill_client(arena: Arena, rng: Random) -> Undo | None:
    client = rng.choice(arena.clients)
    arena.note_segments()
    return client.start if client.batches() and not client.away and client.kill() else None


FAULTS: Final[dict[str, Fault]] = {
    "worker-killed": Fault("a worker, by SIGKILL", (0, 0), _kill_worker),
    "worker-stopped": Fault("a worker, by SIGSTOP, for longer than its node waits", LONG_S, _stop_worker),
    "dispatcher-stopped": Fault(
        "a node's dispatcher, by SIGSTOP, for longer than clients wait", LONG_S, _stop_dispatcher
    ),
    "node-stopped": Fault("all of a node, by SIGSTOP, workers in mid-slice, for as long", LONG_S, _stop_node),
    "node-restarted": Fault("a node, by SIGKILL, and started again at its address", SHORT_S, _restart_node),
    "node-lost": Fault("a node, by SIGKILL, for good", (0, 0), _lose_node),
    "node-added": Fault("a new node, in mid-epoch", (0, 0), _add_node),
    "link-cut": Fault("a link: connections reset, new ones refused", SHORT_S, _cut_link),
    "link-held": Fault("a link: nothing passes for longer than clients wait, and then all of it", LONG_S, _hold_link),
    "link-half-open": Fault("a link: the node's end is gone, the client's is not", LONG_S, _half_open_link),
    "link-delayed": Fault("a link: every byte late by 20 to 400 ms", SHORT_S, _delay_link),
    "name-shrunk": Fault(
        "a name: a node that is there is left out of it, for longer than look-ups wait", LOOK_UPS_S, _hide_address
    ),
    "name-failing": Fault("a name: nobody answers what it stands for", LOOK_UPS_S, _fail_names),
    "client-killed": Fault("a client, by SIGKILL, resumed from its saved state", SHORT_S, _kill_client),
}
