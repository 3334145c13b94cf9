"""Measurements of nodes and loaders, and the rates and the bottleneck that follow from them.

**Metrics** are frozen records, which a node or loader passes to its hook. A hook is any callable that takes a record and
returns quickly; it may store, print or export it (see ``prometheus.py``). A node calls its hook twice a second, a loader
after each batch. The names of fields end in their unit. A counter only grows; its differences are rates.

**Rates** compare two statuses of one node. The bottleneck is that of the first rule that applies to the time between:

1. No slice was made and none is requested: **idle** without clients, else **trainer** (the clients need nothing).
2. No slice was made although some are requested: the stage that most workers are in.
3. Workers were busy for at least BUSY of the time: the stage that took most of it, **read**, **decode** or **augment**.
4. At least SENDING slices were being sent, on average: **network**, or clients that read slowly.
5. Otherwise the workers had idle time, so the clients requested too little: **trainer**.
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
    """The meaning of a field that only grows; ``label`` names the keys if its value is a dict."""

    help: str
    label: str = ""


@dataclass(frozen=True)
class Gauge:
    """The meaning of a field that rises and falls; ``label`` names the keys if its value is a dict."""

    help: str
    label: str = ""


@dataclass(frozen=True)
class NodeMetrics:
    """The metrics of a node."""

    uptime_s: Annotated[float, Gauge("Seconds since the node started.")]
    samples: Annotated[int, Counter("Samples delivered to clients.")]
    delivered_bytes: Annotated[int, Counter("Bytes of samples delivered to clients.")]
    clients: Annotated[dict[str, int], Gauge("Clients, by transport.", "transport")]
    workers: Annotated[dict[str, int], Gauge("Workers, by state.", "state")]
    queued_requests: Annotated[int, Gauge("Requests that wait for a worker or a send slot.")]
    leases: Annotated[int, Gauge("Slices that workers hold and have not finished.")]
    send_slots: Annotated[int, Gauge("Slots for slices in frames.")]
    send_slots_used: Annotated[int, Gauge("Send slots that hold a slice, being written or being sent.")]
    stage_s: Annotated[dict[str, float], Counter("Seconds spent in each stage, summed over workers.", "stage")]
    busy_s: Annotated[float, Counter("Seconds that workers were busy, summed over workers.")]
    restarts: Annotated[int, Counter("Workers that died and were replaced.")]
    reassigned: Annotated[int, Counter("Leases that moved to another worker.")]
    bad_samples: Annotated[int, Counter("Failures that named a bad record.")]
    refused_messages: Annotated[int, Counter("Messages that broke the protocol and were dropped.")]

    @classmethod
    def of(cls, status: Status) -> NodeMetrics:
        """Return the metrics in a node's status."""
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
    """The metrics of a loader. ``waited_s`` and ``used_s`` add up to the time since the first call for a batch."""

    batches: Annotated[int, Counter("Batches returned to the caller.")]
    samples: Annotated[int, Counter("Samples returned to the caller.")]
    delivered_bytes: Annotated[int, Counter("Bytes of the samples returned to the caller.")]
    waited_s: Annotated[float, Counter("Seconds that the caller waited for batches, including the first.")]
    used_s: Annotated[float, Counter("Seconds between the return of a batch and the call for the next.")]
    slots: Annotated[dict[str, int], Gauge("Slots, by state.", "state")]
    duplicates_refused: Annotated[int, Counter("Answers for slices that were given up or received before.")]
    reassigned: Annotated[int, Counter("Slices that were requested again.")]
    substituted: Annotated[int, Counter("Samples of bad records, filled with the pixels of another record.")]

    @property
    def waiting_share(self) -> float:
        """Share of the time that the caller waited for data, 0..1."""
        return self.waited_s / max(self.waited_s + self.used_s, 1e-9)  # before the first batch both are 0


def _count(kinds: tuple[str, ...], found: list[str]) -> dict[str, int]:
    """Count each kind, with zeros: a time series that disappears and returns breaks rates in Prometheus."""
    return {kind: found.count(kind) for kind in kinds}


NodeHook = Callable[[NodeMetrics], None]
LoaderHook = Callable[[LoaderMetrics], None]


BUSY: Final = 0.75
"""Share of the workers' time above which they are the bottleneck. Below it, most requests find an idle worker; pools that
were the bottleneck measured above 0.9."""

SENDING: Final = 0.75
"""Slices being sent, on average, above which the network is the bottleneck: a connection that is busy three quarters of
the time, the same share as BUSY."""


class Bottleneck(msgspec.Struct, frozen=True):
    """The bottleneck of a node: ``what`` is a word of the rules above, ``why`` the reason in a sentence."""

    what: str
    why: str


class Rates(msgspec.Struct, frozen=True):
    """The rates of a node between two statuses.

    Fields:
        interval_s: seconds between the statuses.
        samples, delivered_bytes: delivered per second.
        workers: samples made per second by each worker, in the order of ``Status.workers``.
        clients: samples delivered per second to each client, in the order of the second status.
        busy: share of the workers' time that they were busy, 0..1.
        stages: share of that busy time by stage, 0..1; ``other`` is the rest.
        sending: slices being sent in frames, on average.
        bottleneck: the bottleneck, by the rules at the top of this file.
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
        """Return the rates between two statuses; without a first one, or after a restart, those since the node's start."""
        if before is None or before.instance != after.instance:  # another instance began its counters at 0
            before = _at_start(after)
        seconds = max(after.uptime_s - before.uptime_s, 1e-3)  # never 0, also for two statuses at once
        busy_s = sum(w.busy_s for w in after.workers) - sum(w.busy_s for w in before.workers)
        took = _stages(after) - _stages(before)
        spent = {stage: getattr(took, stage) for stage in STAGES}
        # Busy time outside of the stages: locks, packets, Python. Clocks differ a little, so never below 0.
        spent["other"] = max(0.0, busy_s - sum(spent.values()))
        busy = busy_s / (seconds * max(1, len(after.workers)))
        sending = (after.send_s - before.send_s) / seconds  # slice-seconds per second: slices, on average
        shares = {stage: s / max(busy_s, 1e-9) for stage, s in spent.items()}
        # Made, not delivered: a slice that waits to be sent shows that workers are not the bottleneck.
        made = sum(w.samples for w in after.workers) - sum(w.samples for w in before.workers)
        old = collections.Counter[str]()  # samples by name; several clients may have the same name
        for client in before.clients:
            old[client.name] += client.samples
        return cls(
            interval_s=seconds,
            samples=(after.samples - before.samples) / seconds,
            delivered_bytes=(after.delivered_bytes - before.delivered_bytes) / seconds,
            workers=tuple(
                (b.samples - a.samples) / seconds for a, b in zip(before.workers, after.workers, strict=True)
            ),
            # A client that said Hello again starts at 0.
            clients=tuple(max(0, c.samples - old[c.name]) / seconds for c in after.clients),
            busy=busy,
            stages=shares,
            sending=sending,
            bottleneck=_bottleneck(after, made=made > 0, busy=busy, shares=shares, sending=sending),
        )


def _bottleneck(after: Status, *, made: bool, busy: float, shares: dict[str, float], sending: float) -> Bottleneck:
    """Apply the rules at the top of this file, in their order."""
    if not made and not after.leases and not after.queued:
        if not after.clients:
            return Bottleneck("idle", "there are no clients")
        return Bottleneck("trainer", "the clients have received all that they requested")
    if not made:
        # Stages now, not sums: sums grow only when a slice is done.
        stages = collections.Counter(w.stage for w in after.workers if w.stage)
        if not stages:
            # Slices are requested, but every send slot is taken.
            return Bottleneck("network", "no worker writes a slice, and no send slot becomes free")
        stage, workers = stages.most_common(1)[0]
        return Bottleneck(
            stage, f"no slice is finished, and {workers} of {len(after.workers)} workers are in this stage"
        )
    if busy >= BUSY:
        stage = max(STAGES, key=lambda name: shares[name])
        return Bottleneck(stage, f"workers are busy {busy:.0%} of the time, {shares[stage]:.0%} of it in this stage")
    if sending >= SENDING:
        return Bottleneck(
            "network", f"{sending:.1f} slices are being sent, on average; workers are busy only {busy:.0%} of the time"
        )
    return Bottleneck("trainer", f"workers are busy only {busy:.0%} of the time: clients request no more")


def _stages(status: Status) -> StageSeconds:
    return sum((w.stages for w in status.workers), StageSeconds())


def _at_start(status: Status) -> Status:
    """Return the status that the node had at its start."""
    replace = msgspec.structs.replace
    workers = tuple(replace(w, samples=0, busy_s=0.0, stages=StageSeconds()) for w in status.workers)
    clients = tuple(replace(c, samples=0) for c in status.clients)
    return replace(status, uptime_s=0.0, samples=0, delivered_bytes=0, send_s=0.0, workers=workers, clients=clients)
