"""The nodes that a ledger may ask: what each of them owes, and which stand still.

Rules of this file: no sockets, clocks or threads; the time comes in with :meth:`Pool.look`.

A node may be there and answer pings and still make nothing: a disk hangs, or a fault lost a request. It stands still when
it has owed something for ``patience_s`` without giving anything: a slice, a piece of one, or a refusal. Then others
are asked for what it owes, if there are any, and it is asked for nothing more as long as they are there, until it gives
something after all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Node(Generic[T]):
    """A node that may be asked.

    Fields:
        name: its address.
        capacity: how many asks it may have at once.
        asks: what it owes by the ask's number, the oldest first.
        still_since: since when it has owed something and given nothing; None if it owes nothing, or gave just now.
        still: whether that is longer than patience.
    """

    name: str
    capacity: int
    asks: dict[int, T] = field(default_factory=dict)
    still_since: float | None = None
    still: bool = False

    @property
    def load(self) -> float:
        """The share of its capacity that is in use; 1 is all of it."""
        return len(self.asks) / self.capacity

    @property
    def has_room(self) -> bool:
        """Whether it may be asked for more."""
        return len(self.asks) < self.capacity

    def owe(self, number: int, asked: T, now: float) -> None:
        """It is asked for something."""
        self.asks[number] = asked
        self.still_since = now if self.still_since is None else self.still_since

    def stir(self) -> None:
        """It has given something."""
        self.still_since, self.still = None, False


class Pool(Generic[T]):
    """All nodes that are there.

    Args:
        patience_s: see the module.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._nodes: dict[str, Node[T]] = {}

    def add(self, name: str, capacity: int) -> None:
        """A node is there; nothing changes if it was before."""
        self._nodes.setdefault(name, Node(name, capacity))

    def remove(self, name: str) -> list[T]:
        """A node is gone; what it owed."""
        gone = self._nodes.pop(name, None)
        return list(gone.asks.values()) if gone else []

    def owed(self, name: str, number: int) -> T | None:
        """What an ask was for, if its node still owes it."""
        node = self._nodes.get(name)
        return node.asks.get(number) if node else None

    def stir(self, name: str) -> None:
        """A node has given something, be it what nobody waits for any more."""
        if node := self._nodes.get(name):
            node.stir()

    def settle(self, name: str, number: int) -> T | None:
        """A node has answered an ask: what it was for, or None if it did not owe it."""
        node = self._nodes.get(name)
        if node is None:
            return None
        node.stir()
        return node.asks.pop(number, None)

    def forget(self, unwanted: Callable[[T], bool]) -> None:
        """Take back asks that nobody waits for any more."""
        for node in self._nodes.values():
            node.asks = {number: asked for number, asked in node.asks.items() if not unwanted(asked)}

    @property
    def askable(self) -> set[str]:
        """The nodes that may be asked, if they have room: those that do not stand still, or all where all do."""
        return {node.name for node in self._askable()}

    @property
    def owing(self) -> int:
        """How many asks are not answered yet."""
        return sum(len(node.asks) for node in self._nodes.values())

    @property
    def full(self) -> bool:
        """Whether no node has room for an ask."""
        return all(not node.has_room for node in self._askable())

    def choose(self, avoid: set[str]) -> Node[T] | None:
        """The node with the smallest share of its capacity in use, of those that have room and are not to be avoided."""
        roomy = [node for node in self._askable() if node.has_room and node.name not in avoid]
        return min(roomy, key=lambda node: (node.load, node.name), default=None)

    def look(self, now: float) -> list[tuple[Node[T], float]]:
        """The nodes that have just come to a standstill, each once, and the seconds that they have given nothing.

        Args:
            now: seconds on a clock that never goes back.
        """
        fresh = []
        for node in self._nodes.values():
            if node.still:
                continue
            if not node.asks or node.still_since is None:
                node.still_since = now if node.asks else None
            elif now - node.still_since >= self._patience_s:
                node.still = True
                fresh.append((node, now - node.still_since))
        return fresh

    def reclaim(self) -> list[T]:
        """Take from the nodes that stand still what others can be asked for: nothing if there are no others."""
        if not self.has_moving:
            return []
        taken: list[T] = []
        for node in self._nodes.values():
            if node.still:
                taken += node.asks.values()
                node.asks = {}
        return taken

    @property
    def has_moving(self) -> bool:
        """Whether there is a node that does not stand still."""
        return any(not node.still for node in self._nodes.values())

    def _askable(self) -> list[Node[T]]:
        moving = [node for node in self._nodes.values() if not node.still]
        return moving or list(self._nodes.values())
