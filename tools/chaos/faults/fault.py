"""The form of a fault, and the choice of its victim.

A fault begins with a function that chooses its victim with the run's random numbers and does the harm. It returns an
:class:`Effect`, whose ``end`` undoes the harm and says whether the fault was seen to act: a process was dead, bytes were
held, a client was refused. A fault that was not seen to act does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random
from typing import Final

from loader_service import defaults
from loader_service.client import resolver
from tools.chaos.arena import Arena
from tools.chaos.haste import SHARE
from tools.chaos.node import ChaosNode, Part

_TIMEOUT_S: Final = SHARE * max(defaults.WORKER_STALL_S, defaults.NODE_SILENT_S)
LONG_S: Final = (_TIMEOUT_S + 1.5, _TIMEOUT_S + 4)
"""Longer than any timeout: of a node with its workers, and of a client with its nodes."""

SHORT_S: Final = (0.2, 4.0)
CLIENTS_S: Final = (2.5, 5.0)
"""Longer than clients take to find a restarted node."""

LOOK_UPS_S: Final = (resolver.INTERVAL_S + 0.5, 2 * resolver.INTERVAL_S)
"""Longer than the time between two look-ups of a name."""


@dataclass(frozen=True)
class Effect:
    """A fault in progress.

    Fields:
        end: ends it, and returns whether it was seen to act.
        begun: a job of the arena that does the harm; the fault's time begins after it. None if the harm is done.
    """

    end: Callable[[], bool]
    begun: Future[None] | None = None


Begin = Callable[[Arena, Random], Effect | None]
"""Begins a fault, or returns None if it finds no victim at this moment."""


@dataclass(frozen=True)
class Fault:
    """One kind of failure.

    Fields:
        what: victim and harm, for people.
        lasts_s: shortest and longest duration; (0, 0) if the harm is final.
        begin: function that injects it; see the module.
        needs_keys: whether it exists only if nodes and clients have keys.
        needs_root: whether only root can inject it.
    """

    what: str
    lasts_s: tuple[float, float]
    begin: Begin
    needs_keys: bool = False
    needs_root: bool = False


def victim(arena: Arena, rng: Random, part: Part = Part.PROCESSES, *, damaging: bool = False) -> ChaosNode | None:
    """Choose a running node, a part of which no other fault holds, and which the clients can spare."""
    # Not held: a second fault on stopped processes would be undone by the first one's end.
    free = [node for node in arena.nodes if node.runs and not node.is_held(part) and not node.unsound]
    candidates = [node for node in free if arena.can_spare(node, damaging=damaging)]
    return rng.choice(candidates) if candidates else None


def restart(arena: Arena, node: ChaosNode, alter: Callable[[], None], start: Callable[[], None]) -> Future[None]:
    """Kill a node, alter something while it is down, and start it again, as a job.

    The node's processes stay held; :func:`restore` lets go of them.
    """
    node.hold(Part.PROCESSES)

    def job() -> None:
        node.kill()
        alter()
        start()

    return arena.begin(job)


def restore(arena: Arena, node: ChaosNode, repair: Callable[[], None]) -> None:
    """End what :func:`restart` began: repair what was altered, and start the node again as it was, as a job."""

    def job() -> None:
        node.kill()
        repair()
        node.start()
        node.unsound = False
        node.let_go(Part.PROCESSES)

    arena.begin(job)
