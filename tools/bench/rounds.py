"""Rounds: contestants take turns, group by group, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

import click

from tools.bench.contest import Contestant, Running
from tools.bench.targets import Rounds
from tools.errors import ToolFailed

WARM_SHARE: Final = 0.4
"""Of a turn's seconds, spent before the clock starts: what was made ahead is used up by then."""


def play(contestants: list[Contestant], rounds: int, seconds: float, missing: dict[str, str]) -> Rounds:
    """Every contestant's turns, group by group; a peer that breaks is out, and why goes to ``missing``.

    Raises:
        ToolFailed: one broke that is no peer.
    """
    turns: Rounds = {}
    for group in dict.fromkeys(each.group for each in contestants):
        with ExitStack() as stack:
            together = [each for each in contestants if each.group == group]
            running = [one for each in together if (one := _start(stack, each, seconds, missing))]
            for number in range(rounds):
                for one in running:
                    turn = one.turn(WARM_SHARE * seconds, seconds)
                    turns.setdefault(one.contestant.name, []).append(turn)
                    click.echo(
                        f"round {number + 1}/{rounds} {one.contestant.name:<18} {turn.images_per_s:>9,.0f}/s", err=True
                    )
    return turns


def _start(stack: ExitStack, contestant: Contestant, seconds: float, missing: dict[str, str]) -> Running | None:
    """A contestant that has had a turn which is not counted, so that pages are mapped and caches warm; None if it broke."""
    click.echo(f"starting {contestant.name}", err=True)
    try:
        one = stack.enter_context(Running(contestant))
        one.wait()
        one.turn(WARM_SHARE * seconds, seconds)
    except ToolFailed as error:
        if contestant.kind != "peer":
            raise
        missing[contestant.name] = str(error)
        return None
    return one
