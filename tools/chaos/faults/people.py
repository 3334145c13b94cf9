"""Faults by people: another user of the machine, and an operator who takes a client off a node's list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Final

from tools.chaos import processes
from tools.chaos.arena import Arena
from tools.chaos.faults.fault import Effect, restart, restore, victim
from tools.errors import ToolFailed

STRANGERS_ID: Final = 61_999
"""User and group id of the stranger: between those of people and nobody's, so no account has it."""

STRANGER_S: Final = 10.0
"""Timeout for the stranger to end; it takes milliseconds."""

MOST_BYTES: Final = 64 << 20
"""Most memory that anybody without an allowed key may cost a node."""


def let_a_stranger_in(arena: Arena, _rng: Random) -> Effect | None:
    """Let another user of the machine plant files, pry segments open and flood the nodes."""
    running = [node for node in arena.nodes if node.runs]
    if not running:  # nothing to flood
        return None
    before = {node.dispatcher: processes.rss_bytes(node.dispatcher) for node in running}
    ports = [str(node.port) for node in running]
    stranger = subprocess.Popen(
        [sys.executable, "-m", "tools.chaos.stranger", str(STRANGERS_ID), *ports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def end() -> bool:
        try:
            said, error = stranger.communicate(timeout=STRANGER_S)  # closes its standard input, which ends it
        except subprocess.TimeoutExpired:
            stranger.kill()
            stranger.communicate()
            raise ToolFailed("the stranger did not end.") from None
        if stranger.returncode:
            raise ToolFailed(f"the stranger failed: {error.strip().splitlines()[-1] if error else 'no reason'}.")
        report = json.loads(said)
        if report["opened"]:
            raise ToolFailed(f"another user opened {report['opened']} segments in /dev/shm.")
        if report["kept"] < report["planted"]:
            raise ToolFailed("a sweep removed files of another user from /dev/shm.")
        for pid, bytes_before in before.items():
            if (grown := processes.rss_bytes(pid) - bytes_before) > MOST_BYTES:
                raise ToolFailed(f"another user without a key made a node grow by {grown >> 20} MiB.")
        return bool(report["planted"] and report["denied"] and report["closed"])

    return Effect(end)


def revoke_key(arena: Arena, rng: Random) -> Effect | None:
    """Restart a node without a client's key on its list; put the key back at the end."""
    node = victim(arena, rng)
    if node is None or node.keys is None:
        return None
    listed = node.keys / "allowed" / f"{rng.choice(arena.clients).name}.key"
    removed = listed.with_suffix(".removed")
    begun = restart(arena, node, lambda: _move(listed, removed), node.start)

    def end() -> bool:
        status = arena.status(node)
        restore(arena, node, lambda: _move(removed, listed))
        return status is not None and status.refused > 0

    return Effect(end, begun)


def _move(path: Path, to: Path) -> None:
    path.rename(to)
