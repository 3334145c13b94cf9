"""What a node and a loader measure of themselves: frozen records, handed to hooks.

A hook is any callable that takes a record: it may store, print or export it (see ``prometheus``), and must be quick. A
node calls its hook twice a second, a loader calls its own once per batch. Names end in their unit; a field that only
ever grows is a counter, whose differences are rates.

The bottleneck, by the first rule that applies to the time between the two answers:

1. Nothing was made and nothing is asked for: **idle** without clients, else **trainer** (the clients have all they want).
2. Nothing was made though something is asked for: the stage that most of the workers with a lease are in.
3. Workers were busy for at least BUSY of the time: the stage that took most of it, **read**, **decode** or **augment**.
4. At least SENDING slices were on their way to clients, on average: **network**, or clients that are slow to take them.
5. Otherwise workers had time to spare, so the clients did not ask for more: **trainer**.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from loader_service.types import STAGES, StageSeconds
from loader_service.wire.messages import Status, WorkerState


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
            workers=_count(tuple(state.value for state in WorkerState), [w.state for w in status.workers]),
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


BUSY: Final = 0.75
"""Below it a request finds an idle worker most of the time; in measurements busy pools lie above 0.9."""

SENDING: Final = 0.75
"""A connection that has something to carry three quarters of the time is as busy as such workers are."""


class Bottleneck(msgspec.Struct, frozen=True):
    """What holds a node up, in one of the words above, and how that is known."""

    what: str
    why: str


class Rates(msgspec.Struct, frozen=True):
    """What a node did between two answers, per second.

    Fields:
        interval_s: the time between them.
        samples, delivered_bytes: delivered, per second.
        workers: samples made per second, by each worker; in the order of ``Status.workers``.
        clients: samples delivered per second, to each client; in the order of the second answer's ``clients``.
        busy: which part of the workers' time was work, 0 .. 1.
        stages: which part of that work went into each stage; ``other`` is what remains.
        sending: how many slices were on their way in frames, on average.
        bottleneck: see this module.
    """

    interval_s: float
    samples: float
    delivered_bytes: float
    workers: tuple[float, ...]
    clients: tuple[float, ...]
    busy: float
    stages: dict[str, float]
    sending: float
    bottleneck: Bottleneck

    @classmethod
    def between(cls, before: Status | None, after: Status) -> Rates:
        """The rates between two answers of one node; without a first one, or after a restart, since its start."""
        if before is None or before.instance != after.instance:
            before = _at_start(after)
        seconds = max(after.uptime_s - before.uptime_s, 1e-3)
        busy_s = sum(w.busy_s for w in after.workers) - sum(w.busy_s for w in before.workers)
        took = _stages(after) - _stages(before)
        spent = {stage: getattr(took, stage) for stage in STAGES}
        spent["other"] = max(0.0, busy_s - sum(spent.values()))
        busy = busy_s / (seconds * max(1, len(after.workers)))
        sending = (after.send_s - before.send_s) / seconds
        shares = {stage: s / max(busy_s, 1e-9) for stage, s in spent.items()}
        made = sum(w.samples for w in after.workers) - sum(w.samples for w in before.workers)
        old = collections.Counter[str]()
        for client in before.clients:
            old[client.name] += client.samples
        return cls(
            interval_s=seconds,
            samples=(after.samples - before.samples) / seconds,
            delivered_bytes=(after.delivered_bytes - before.delivered_bytes) / seconds,
            workers=tuple(
                (b.samples - a.samples) / seconds for a, b in zip(before.workers, after.workers, strict=True)
            ),
            clients=tuple(max(0, c.samples - old[c.name]) / seconds for c in after.clients),
            busy=busy,
            stages=shares,
            sending=sending,
            bottleneck=_bottleneck(after, made=made > 0, busy=busy, shares=shares, sending=sending),
        )


def _bottleneck(after: Status, *, made: bool, busy: float, shares: dict[str, float], sending: float) -> Bottleneck:
    if not made and not after.leases and not after.queued:
        if not after.clients:
            return Bottleneck("idle", "there are no clients")
        return Bottleneck("trainer", "the clients have all they asked for")
    if not made:
        stages = collections.Counter(w.stage for w in after.workers if w.stage)
        if not stages:
            return Bottleneck("network", "no slice is in the making, and the send slots do not come back")
        stage, workers = stages.most_common(1)[0]
        return Bottleneck(stage, f"nothing comes out, and {workers} of {len(after.workers)} workers are in it")
    if busy >= BUSY:
        stage = max(STAGES, key=lambda name: shares[name])
        return Bottleneck(
            stage, f"the workers are busy {busy:.0%} of the time, and {shares[stage]:.0%} of that is here"
        )
    if sending >= SENDING:
        return Bottleneck(
            "network", f"{sending:.1f} slices are on their way, on average; the workers are busy only {busy:.0%}"
        )
    return Bottleneck("trainer", f"the workers are busy only {busy:.0%} of the time: nobody asks for more")


def _stages(status: Status) -> StageSeconds:
    return sum((w.stages for w in status.workers), StageSeconds())


def _at_start(status: Status) -> Status:
    """The same node when it had done nothing yet."""
    replace = msgspec.structs.replace
    workers = tuple(replace(w, samples=0, busy_s=0.0, stages=StageSeconds()) for w in status.workers)
    clients = tuple(replace(c, samples=0) for c in status.clients)
    return replace(status, uptime_s=0.0, samples=0, delivered_bytes=0, send_s=0.0, workers=workers, clients=clients)
