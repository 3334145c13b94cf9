"""Contestants that take turns on one machine, as in ``make bench``, except that one that fails loses only itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tools.bench.contest import Contestant, Running
from tools.errors import ToolFailed

WARM_SHARE = 0.3
"""Warm-up before the clock starts, as a share of a turn's seconds."""


def play(
    contestants: Sequence[Contestant],
    rounds: int,
    seconds: float,
    ready_s: float,
    report: Callable[[Contestant, list[float]], None],
    failed: Callable[[Contestant, str], None],
) -> None:
    """Start all contestants at once and let them take turns.

    Args:
        contestants: in the order of their turns.
        rounds: turns of each.
        seconds: length of a turn.
        ready_s: time in which all must be ready.
        report: called with all rates of a contestant, images/s, after each of its turns.
        failed: called with the reason when a contestant fails.
    """
    with ExitStack() as stack:
        started = [stack.enter_context(Running(each)) for each in contestants]
        limit_s = time.monotonic() + ready_s
        running: list[tuple[Running, list[float]]] = []
        for one in started:
            try:
                one.wait(max(0.0, limit_s - time.monotonic()))
            except ToolFailed as error:
                failed(one.contestant, str(error))
                one.close()
            else:
                running.append((one, []))
        for _ in range(rounds):
            for one, rates in list(running):
                try:
                    turn = one.turn(WARM_SHARE * seconds, seconds, ready_s)
                except ToolFailed as error:
                    failed(one.contestant, str(error))
                    running.remove((one, rates))
                else:
                    rates.append(turn.images_per_s)
                    report(one.contestant, list(rates))
