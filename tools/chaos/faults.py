"""The kinds of faults: how each chooses a victim, begins and ends.

A fault begins with a function that chooses its victim with the run's random numbers, does the harm and returns a function
that undoes it. It returns None if there is no victim at this moment; the fault then does not count as injected.
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
from tools.chaos.node import ChaosNode

Undo = Callable[[], None]
Begin = Callable[[Arena, Random], Undo | None]

LONG_S: Final = (
    max(defaults.WORKER_STALL_S, defaults.NODE_SILENT_S) + 1.5,
    max(defaults.WORKER_STALL_S, defaults.NODE_SILENT_S) + 4,
)
"""Longer than any timeout: of a node with its workers, and of a client with its nodes."""

SHORT_S: Final = (0.2, 4.0)
LOOK_UPS_S: Final = (resolver.INTERVAL_S + 0.5, 2 * resolver.INTERVAL_S)
"""Longer than the time between two look-ups of a name."""


@dataclass(frozen=True)
class Fault:
    """One kind of failure.

    Fields:
        what: victim and harm, for people.
        lasts_s: shortest and longest duration; (0, 0) if the harm is final.
        begin: function that injects it; see the module.
    """

    what: str
    lasts_s: tuple[float, float]
    begin: Begin


def _nothing() -> None:
    """Undo nothing: the harm is final."""


def _victim(arena: Arena, rng: Random) -> ChaosNode | None:
    """Choose a running node whose processes no other fault holds."""
    # Not troubled: a second fault on stopped processes would be undone by the first one's end.
    candidates = [node for node in arena.nodes if node.runs and not node.troubled]
    return rng.choice(candidates) if candidates else None


def _free_link(arena: Arena, rng: Random) -> ChaosNode | None:
    """Choose a running node whose link no other fault holds."""
    candidates = [node for node in arena.nodes if node.runs and not node.link_troubled]
    return rng.choice(candidates) if candidates else None


def _kill_worker(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    workers = node.workers() if node else []
    # None if it had ended already: not injected.
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


def _stop(node: ChaosNode, pids: list[int]) -> Undo | None:
    if not processes.send(pids, signal.SIGSTOP):  # all had ended
        return None
    node.troubled = True  # until undo(), also if the node has replaced the worker meanwhile

    def undo() -> None:
        processes.send(pids, signal.SIGCONT)  # no effect on a process that its node has killed meanwhile
        node.troubled = False

    return undo


def _restart_node(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    if node is None:
        return None
    node.kill()
    node.troubled = True

    def undo() -> None:
        node.start()  # waits until the node serves; no other fault begins meanwhile
        node.troubled = False

    return undo


def _lose_node(arena: Arena, rng: Random) -> Undo | None:
    node = _victim(arena, rng)
    if node is None or sum(other.runs for other in arena.nodes) < 3:  # at least two nodes stay
        return None
    node.kill()
    return _nothing


def _add_node(arena: Arena, rng: Random) -> Undo | None:
    fresh = [node for node in arena.nodes if not node.sessions]  # never started; a lost node stays lost
    if not fresh:
        return None
    arena.add(rng.choice(fresh))  # also to the name, so that both clients find it
    return _nothing


def _cut_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    # Coroutines of a link run in the loop's thread, which owns its connections; do() waits for the result.
    arena.links.do(node.link.cut())
    return _repair(node, lambda: arena.links.do(node.link.listen()))


def _hold_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    arena.links.do(node.link.hold())
    return _repair(node, lambda: arena.links.do(node.link.release()))


def _half_open_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    arena.links.do(node.link.leave_half_open())
    return _repair(node, lambda: arena.links.do(node.link.end_half_open()))


def _delay_link(arena: Arena, rng: Random) -> Undo | None:
    node = _free_link(arena, rng)
    if node is None:
        return None
    node.link.delay_s = rng.uniform(0.02, 0.4)  # a plain number, which the loop's thread reads for each chunk

    def undo() -> None:
        node.link.delay_s = 0.0

    return _repair(node, undo)


def _repair(node: ChaosNode, repair: Undo) -> Undo:
    """Mark a node's link as held by a fault; return a function that repairs it and removes the mark."""
    node.link_troubled = True  # apart from `troubled`: a link may fail while its node is stopped

    def undo() -> None:
        repair()
        node.link_troubled = False

    return undo


def _hide_address(arena: Arena, rng: Random) -> Undo | None:
    named = [node.link.host for node in arena.nodes if node.runs and node.link.host not in arena.names.hidden]
    if len(named) < 2:  # at least one address stays
        return None
    host = rng.choice(named)
    arena.names.hide(host)
    return lambda: arena.names.reveal(host)


def _fail_names(arena: Arena, _rng: Random) -> Undo | None:
    if arena.names.failing:  # one name server: a second failure would end with the first
        return None
    arena.names.fail()
    return arena.names.recover


def _kill_client(arena: Arena, rng: Random) -> Undo | None:
    client = rng.choice(arena.clients)
    arena.note_segments()  # the client's are gone from /proc once it is killed
    # A saved state first, so that the restart is a resume. kill() last: it acts, and tells whether the client ran.
    return client.start if client.batches() and not client.killed and client.kill() else None


FAULTS: Final[dict[str, Fault]] = {
    "worker-killed": Fault("worker killed (SIGKILL)", (0, 0), _kill_worker),
    "worker-stopped": Fault("worker suspended (SIGSTOP) for longer than its node waits", LONG_S, _stop_worker),
    "dispatcher-stopped": Fault(
        "dispatcher suspended (SIGSTOP) for longer than clients wait", LONG_S, _stop_dispatcher
    ),
    "node-stopped": Fault("all of a node suspended (SIGSTOP), workers while writing a slice", LONG_S, _stop_node),
    "node-restarted": Fault("node killed (SIGKILL) and restarted at its address", SHORT_S, _restart_node),
    "node-lost": Fault("node killed (SIGKILL) and not restarted", (0, 0), _lose_node),
    "node-added": Fault("node added during an epoch", (0, 0), _add_node),
    "link-cut": Fault("link: connections reset, new ones refused", SHORT_S, _cut_link),
    "link-held": Fault("link: all bytes held for longer than clients wait, then delivered", LONG_S, _hold_link),
    "link-half-open": Fault("link: connections closed for the node, open for the client", LONG_S, _half_open_link),
    "link-delayed": Fault("link: every byte delayed by 20 to 400 ms", SHORT_S, _delay_link),
    "name-shrunk": Fault(
        "name: a running node's address left out for longer than a look-up interval", LOOK_UPS_S, _hide_address
    ),
    "name-failing": Fault("name: look-ups fail", LOOK_UPS_S, _fail_names),
    "client-killed": Fault("client killed (SIGKILL) and resumed from its saved state", SHORT_S, _kill_client),
}
