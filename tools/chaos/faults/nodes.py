"""Faults of a node's processes and of its limits."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final

from loader_service.node.dispatcher import MAX_CLIENTS
from tools.chaos import processes
from tools.chaos.arena import Arena
from tools.chaos.faults.fault import Effect, restart, victim
from tools.chaos.link import HOST
from tools.chaos.node import ChaosNode, Part
from tools.errors import ToolFailed

DESCRIPTORS: Final = 64
IDLE_CONNECTIONS: Final = 80
"""More than DESCRIPTORS allow, and few enough for this process."""

IDLE_TURN_S: Final = 0.05
"""Pause before a connection that was closed is opened again."""

CROWD_S: Final = 30.0
"""Timeout for a crowd of clients to connect; it takes one or two seconds."""


def kill_worker(arena: Arena, rng: Random) -> Effect | None:
    """Kill a worker."""
    node = victim(arena, rng)
    workers = node.workers() if node else []
    if not workers:
        return None
    worker = rng.choice(workers)
    processes.send([worker], signal.SIGKILL)
    return Effect(lambda: not processes.state(worker))


def stop_worker(arena: Arena, rng: Random) -> Effect | None:
    """Suspend a worker."""
    node = victim(arena, rng)
    workers = node.workers() if node else []
    return _stop(node, [rng.choice(workers)]) if node and workers else None


def stop_dispatcher(arena: Arena, rng: Random) -> Effect | None:
    """Suspend a dispatcher."""
    node = victim(arena, rng)
    return _stop(node, [node.dispatcher]) if node else None


def stop_node(arena: Arena, rng: Random) -> Effect | None:
    """Suspend all processes of a node."""
    node = victim(arena, rng)
    return _stop(node, node.family()) if node else None


def _stop(node: ChaosNode, pids: list[int]) -> Effect:
    processes.send(pids, signal.SIGSTOP)
    node.hold(Part.PROCESSES)  # until the end, also if the node has replaced the worker meanwhile

    def end() -> bool:
        # Suspended still, or killed by its node because it was.
        acted = all(processes.state(pid) in ("T", "") for pid in pids)
        processes.send(pids, signal.SIGCONT)  # no effect on a process that its node has killed meanwhile
        node.let_go(Part.PROCESSES)
        return acted

    return Effect(end)


def restart_node(arena: Arena, rng: Random) -> Effect | None:
    """Kill a node; start it again at the end."""
    node = victim(arena, rng)
    if node is None:
        return None
    dispatcher = node.dispatcher
    node.kill()
    node.hold(Part.PROCESSES)

    def end() -> bool:
        def start() -> None:
            node.start()  # waits until the node serves
            node.let_go(Part.PROCESSES)

        arena.begin(start)
        return not processes.state(dispatcher)

    return Effect(end)


def lose_node(arena: Arena, rng: Random) -> Effect | None:
    """Kill a node for good."""
    node = victim(arena, rng)
    if node is None or sum(other.runs for other in arena.nodes) < 4:  # at least three nodes stay
        return None
    dispatcher = node.dispatcher
    node.kill()
    return Effect(lambda: not processes.state(dispatcher))


def add_node(arena: Arena, rng: Random) -> Effect | None:
    """Start a node at an address that has none: a new one, or one whose node was lost before."""
    empty = [node for node in arena.nodes if not node.runs and not node.is_held(Part.PROCESSES)]
    if not empty:
        return None
    node = rng.choice(empty)
    return Effect(lambda: node.runs, arena.add(node))  # also to the name, so that all clients find it


def fill_node(arena: Arena, rng: Random) -> Effect | None:
    """Restart a node and give its room for clients to idle ones before the real clients come back."""
    node = victim(arena, rng)
    if node is None or node.is_held(Part.LINK):
        return None
    node.hold(Part.LINK)
    crowd: list[subprocess.Popen[str]] = []

    def fill() -> None:
        arena.links.do(node.link.cut())  # so that the crowd is there first
        node.start()
        try:
            crowd.append(_crowd(node.direct, arena.watcher))
        finally:
            arena.links.do(node.link.listen())

    begun = restart(arena, node, lambda: None, fill)

    def end() -> bool:
        status = arena.status(node)
        for people in crowd:
            _send_home(people)
        node.let_go(Part.LINK)
        node.let_go(Part.PROCESSES)
        return status is not None and len(status.clients) >= MAX_CLIENTS and status.refused > 0

    return Effect(end, begun)


def _crowd(address: str, keys: Path | None) -> subprocess.Popen[str]:
    """Start a crowd and wait until its clients are welcome."""
    command = [sys.executable, "-m", "tools.chaos.crowd", address, str(MAX_CLIENTS)]
    crowd = subprocess.Popen(
        [*command, *(["--keys", str(keys)] if keys else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert crowd.stdout is not None
    said = crowd.stdout.readline().strip()
    if said != f"clients {MAX_CLIENTS}":
        _send_home(crowd)
        raise ToolFailed(f"a crowd of {MAX_CLIENTS} clients at {address} came to {said or 'nothing'!r}.")
    return crowd


def _send_home(crowd: subprocess.Popen[str]) -> None:
    """Let a crowd say goodbye and end."""
    try:
        crowd.communicate(timeout=CROWD_S)  # closes its standard input, which ends it
    except subprocess.TimeoutExpired:
        crowd.kill()
        crowd.communicate()


def starve_node(arena: Arena, rng: Random) -> Effect | None:
    """Restart a node with a low limit of descriptors, and take the rest with idle connections."""
    node = victim(arena, rng)
    if node is None:
        return None
    idle = Idle(node.port)

    def start() -> None:
        node.start(descriptors=DESCRIPTORS)
        idle.start()

    begun = restart(arena, node, lambda: None, start)

    def end() -> bool:
        idle.close()
        # The node goes on with its limit, and has to serve its clients again.
        node.let_go(Part.PROCESSES)
        return idle.turned_away > 0

    return Effect(end, begun)


class Idle:
    """Connections to a port that say nothing, in a thread; those that are closed are opened again.

    Fields:
        turned_away: connections that were closed before a node greeted them, as one without descriptors has to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._greeted: dict[socket.socket, bool] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._stay, name="idle", daemon=True)
        self.turned_away = 0

    def start(self) -> None:
        """Open the connections."""
        self._thread.start()

    def close(self) -> None:
        """Close the connections, if they were opened."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _stay(self) -> None:
        while not self._over.wait(IDLE_TURN_S):
            while len(self._greeted) < IDLE_CONNECTIONS:
                with suppress(OSError):  # the node has ended, or its backlog is full
                    self._greeted[socket.create_connection((HOST, self._port), IDLE_TURN_S)] = False
                    continue
                break
            for one in select.select(self._greeted, [], [], 0)[0]:
                self._hear(one)
        for one in self._greeted:
            one.close()

    def _hear(self, one: socket.socket) -> None:
        try:
            said = one.recv(64)
        except OSError:  # reset
            said = b""
        if said:
            self._greeted[one] = True
        else:
            self.turned_away += not self._greeted.pop(one)
            one.close()
