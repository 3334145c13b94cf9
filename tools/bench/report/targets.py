"""The targets of this project, and the figures that reach them or do not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

import msgspec

from tools.bench.checksums import FIRST
from tools.bench.contest import Rounds
from tools.bench.single import Single


class Spread(msgspec.Struct, frozen=True):
    """A median with its lowest and highest value."""

    median: float
    least: float
    most: float


class Target(msgspec.Struct, frozen=True):
    """A target and the figure for it.

    Fields:
        what: subject, for people.
        need: bound, for people.
        figure: measured figure; None if a contestant for it was not measured.
        reached: whether the figure reaches the target.
        disturbed: whether the figure exceeds its physical bound: the limit's own turns were disturbed, so it means nothing.
    """

    what: str
    need: str
    figure: Spread | None
    reached: bool
    disturbed: bool = False


def spread(values: Sequence[float]) -> Spread:
    """Return the median, the lowest and the highest of some figures."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(rounds: Rounds, name: str, others: Sequence[str]) -> Spread | None:
    """Return a contestant's rate divided by the best of the others' in the same round.

    None if the contestant was not measured, or none of the others was.
    """
    there = [rounds[other] for other in others if other in rounds]  # a peer that was not measured does not count
    if name not in rounds or not there:
        return None
    # One column per round: the best of the others may be another one in each.
    best = [max(turn.images_per_s for turn in turns) for turns in zip(*there, strict=True)]
    # Ratios first, then the median: a disturbance of a whole round cancels out, which a ratio of medians would keep.
    return spread([turn.images_per_s / rate for turn, rate in zip(rounds[name], best, strict=True)])


RATIOS: Final = (
    ("raw, shared memory: of the memcpy limit", "ours-raw-shm", ("memcpy",), 0.60),
    ("raw, shared memory: times FFCV raw", "ours-raw-shm", ("ffcv-raw",), 6.0),
    ("raw, shared memory: times DataLoader over LMDB", "ours-raw-shm", ("dataloader-raw",), 16.0),
    ("jpeg, shared memory: of the decode limit", "ours-jpeg-shm", ("decode",), 0.85),
    ("jpeg, shared memory: times the best of DALI and FFCV", "ours-jpeg-shm", ("dali-jpeg", "ffcv-jpeg"), 2.0),
    ("jpeg, shared memory: times DataLoader", "ours-jpeg-shm", ("dataloader-jpeg", "dataloader-files"), 4.0),
    ("raw over TCP loopback: of ZeroMQ alone", "ours-raw-tcp-1", ("zmq",), 0.70),
    ("raw over TCP loopback with CURVE: of ZeroMQ with CURVE", "ours-raw-curve-1", ("zmq-curve",), 0.70),
)
"""Title, contestant, the others (the best of them counts), and the lowest ratio that reaches the target."""

BOUNDS: Final = ("memcpy", "zmq", "zmq-curve")
"""Physical bounds. Decoding whole records with libjpeg-turbo is none: a crop needs less work."""

BELIEVED: Final = 1.1
"""Largest share of a bound that noise explains."""


def targets(rounds: Rounds, single: Single | None) -> list[Target]:
    """Return all targets, in order."""
    found = []
    for what, name, others, need in RATIOS:
        figure = ratio(rounds, name, others)
        # The first of the others is enough: a row that compares with a bound compares with nothing else.
        disturbed = figure is not None and others[0] in BOUNDS and figure.median > BELIEVED
        reached = figure is not None and figure.median >= need and not disturbed
        found.append(Target(what, f"at least {need:.2f}", figure, reached, disturbed))
    if turns := rounds.get("ours-raw-shm"):
        # Within a turn: both figures are per image of the same turn.
        share = spread([turn.consumer_cpu_ms / turn.cpu_ms for turn in turns])
        found.append(Target("raw: trainer process's share of the CPU time", "below 0.05", share, share.median < 0.05))
    if single:
        found += _single_targets(single)
    return found


def _single_targets(single: Single) -> list[Target]:
    # Rounds alternate, so pairs ran one after the other.
    rates = zip(single.preprocess_per_s, single.standardise_per_s, strict=True)
    preprocess = spread([whole / alone for whole, alone in rates])
    return [
        *(
            Target(
                f"checksums, {row}: of a sample's CPU time", "below 0.02", figure := spread(costs), figure.median < 0.02
            )
            for row, costs in single.checksums.items()
            if row != FIRST  # no target: it happens once per node and record
        ),
        Target("preprocessing: of decode + resize alone", "at least 0.75", preprocess, preprocess.median >= 0.75),
        # max(), not the median: every worker must keep the bound.
        Target("MB of a worker's own", "below 60", spread(single.worker_mb), max(single.worker_mb) < 60),
        # A bool as a figure, 1.0 or 0.0, for the same table.
        Target("no torch in a worker (1: none)", "1", spread([float(single.torch_free)]), single.torch_free),
        Target(
            "seconds from start to the first batch", "at most 1.5", spread(single.starts_s), single.first_batch_s <= 1.5
        ),
    ]
