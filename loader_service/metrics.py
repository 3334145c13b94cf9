"""What a node and a loader measure of themselves: frozen records, handed to hooks.

A hook is any callable that takes a record: it may store, print or export it (see ``prometheus``), and must be quick. A
node calls its hook twice a second, a loader calls its own once per batch. Names end in their unit; a field that only
ever grows is a counter, whose differences are rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from loader_service.types import STAGES
from loader_service.wire.messages import Status


@dataclass(frozen=True)
class Counter:
    """What only grows: its meaning, and, where the value is a dict, the name of what its keys are."""

    help: str
    label: str = ""


@dataclass(frozen=True)
class Gauge:
    """What goes up and down; else as a Counter."""

    help: str
    label: str = ""


@dataclass(frozen=True)
class NodeMetrics:
    """A node, as far as it can be counted."""

    uptime_s: Annotated[float, Gauge("Seconds since the node started.")]
    samples: Annotated[int, Counter("Samples delivered to clients.")]
    delivered_bytes: Annotated[int, Counter("Bytes of samples delivered to clients.")]
    clients: Annotated[dict[str, int], Gauge("Clients, by how they are reached.", "transport")]
    workers: Annotated[dict[str, int], Gauge("Workers, by what they do.", "state")]
    queued_requests: Annotated[int, Gauge("Requests that wait for a worker or a send slot.")]
    leases: Annotated[int, Gauge("Slices that workers have and have not finished.")]
    send_slots: Annotated[int, Gauge("Slots for slices that go in frames.")]
    send_slots_used: Annotated[int, Gauge("Those of them that hold a slice, in the making or on its way.")]
    stage_s: Annotated[dict[str, float], Counter("Seconds spent in each stage, summed over workers.", "stage")]
    busy_s: Annotated[float, Counter("Seconds that workers worked, summed over them.")]
    restarts: Annotated[int, Counter("Workers that ended and were replaced.")]
    reassigned: Annotated[int, Counter("Leases that went to another worker.")]
    bad_samples: Annotated[int, Counter("Times that a record was called bad.")]
    refused_messages: Annotated[int, Counter("Messages that break the protocol, and were dropped.")]

    @classmethod
    def of(cls, status: Status) -> NodeMetrics:
        """The countable part of a node's status."""
        return cls(
            uptime_s=status.uptime_s,
            samples=status.samples,
            delivered_bytes=status.delivered_bytes,
            clients=_count(("shm", "tcp"), [c.transport for c in status.clients]),
            workers=_count(("starting", "idle", "working"), [w.state for w in status.workers]),
            queued_requests=status.queued,
            leases=status.leases,
            send_slots=status.send_slots,
            send_slots_used=status.send_slots_used,
            stage_s={
                **{stage: sum(getattr(w.stages, stage) for w in status.workers) for stage in STAGES},
                "send": status.send_s,
            },
            busy_s=sum(w.busy_s for w in status.workers),
            restarts=status.restarts,
            reassigned=status.reassigned,
            bad_samples=status.bad_samples,
            refused_messages=status.refused,
        )


@dataclass(frozen=True)
class LoaderMetrics:
    """A loader, as its caller sees it. ``waited_s`` and ``used_s`` together are the time since its first batch."""

    batches: Annotated[int, Counter("Batches returned to the caller.")]
    samples: Annotated[int, Counter("Samples returned to the caller.")]
    delivered_bytes: Annotated[int, Counter("Bytes of the samples returned to the caller.")]
    waited_s: Annotated[float, Counter("Seconds that the caller waited for a batch, the first one included.")]
    used_s: Annotated[float, Counter("Seconds between a batch's return and the call for the next.")]
    slots: Annotated[dict[str, int], Gauge("Slots, by what they are in use for.", "state")]
    duplicates_refused: Annotated[int, Counter("Answers for slices that were given up or already there.")]
    reassigned: Annotated[int, Counter("Slices that were asked for again.")]
    substituted: Annotated[int, Counter("Samples whose record was bad and whose pixels are another's.")]

    @property
    def waiting_share(self) -> float:
        """Which part of the time the caller waited for data: 0 .. 1."""
        return self.waited_s / max(self.waited_s + self.used_s, 1e-9)


def _count(kinds: tuple[str, ...], found: list[str]) -> dict[str, int]:
    """How often each kind was found, with zeros, so that no series comes and goes."""
    return {kind: found.count(kind) for kind in kinds}


NodeHook = Callable[[NodeMetrics], None]
LoaderHook = Callable[[LoaderMetrics], None]
