"""A worker process: it knows one thing, to fill these bytes with this slice.

It is forked by the fork server, opens the datasets by itself, and then reads leases from its end of a socket pair until the
other end is gone. Before each record it publishes the record's number in memory shared with the dispatcher, so that even a
death by SIGKILL names its record.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.data import golden
from loader_service.data.fill import fill
from loader_service.data.records import Records
from loader_service.data.stopwatch import Stopwatch
from loader_service.errors import DatasetInvalid, DatasetNotFound, NodeFailed, RecordError, SharedMemoryError
from loader_service.node.packets import MAX_PACKET_BYTES, Bad, Done, Lease, Ready, decode_lease, encode
from loader_service.types import BUILTIN_GOLDEN, DRAWS, DatasetFacts, Installation, SampleLayout, Slice, Split
from loader_service.wire.shm import Claim, Segment

log = logging.getLogger("loader_service.node")

SPLITS: Final[tuple[Split, ...]] = ("train", "val")
NO_RECORD: Final = -1

_MAX_SEGMENTS: Final = 64
"""Clients' segments kept mapped; the one that was used longest ago goes first."""

STALE: Final = {
    Claim.BUSY: "a late writer holds the part",
    Claim.GIVEN_UP: "the part's generation is no longer the lease's",
}
"""Why a place was not written; the client asks anew if it still wants the slice."""

_PR_SET_PDEATHSIG: Final = 1


def prove() -> Installation:
    """The built-in golden hash as this installation makes it, and what of the machine decides it.

    Raises:
        NodeFailed: it is another than it must be, so that every client would refuse this node.
    """
    try:
        made = golden.installation()
    except ValueError as error:
        raise NodeFailed(f"a built-in picture cannot be used, and so records cannot: {error}") from error
    if made.golden != BUILTIN_GOLDEN:
        raise NodeFailed(
            f"its golden hash of the built-in pictures is {made.golden} with {made}, and it must be {BUILTIN_GOLDEN}: "
            "clients would refuse the samples; install the versions that constraints.txt names"
        )
    return made


def survey(data: Path) -> dict[Split, DatasetFacts]:
    """What the splits under ``data`` are, with the golden hash that this installation makes of each.

    Raises:
        DatasetNotFound: there is no split at all.
        DatasetInvalid, DatasetUnfinished: a split cannot be served.
    """
    facts: dict[Split, DatasetFacts] = {}
    for split in SPLITS:
        path = data / f"{split}.lmdb"
        if not path.exists():
            continue
        with Records(path) as records:
            manifest = records.manifest
            _check_golden(records)
            facts[split] = DatasetFacts(
                count=manifest.count,
                class_names=manifest.class_names,
                mean_image=manifest.mean_image,
                channel_means=manifest.channel_means,
                eigenvalues=manifest.eigenvalues,
                eigenvectors=manifest.eigenvectors,
                fingerprint=manifest.fingerprint,
                golden=manifest.golden,
            )
    if not facts:
        raise DatasetNotFound(data / "train.lmdb")
    return facts


def _check_golden(records: Records) -> None:
    """Refuse to serve other bytes than the dataset's writer had; a bad record is the clients' to judge, not ours."""
    need = records.manifest.golden
    try:
        made = golden.of_dataset(records)
    except RecordError as error:
        log.warning("The golden samples cannot be compared, since one of them is bad. %s", error)
        return
    if made != need:
        raise DatasetInvalid(
            records.path,
            f"its golden samples come out as {made} here, the manifest says {need}: the records are damaged, or this "
            "machine's libraries decode them to other bytes",
        )


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


class Worker:
    """The worker's loop.

    Args:
        link: its end of the socket pair with the dispatcher.
        data: the directory of the splits.
        facts: what the node told its clients of each; a dataset that was replaced since is not served.
        own: the node's send slots, inherited.
        at: (2,) int64 in memory shared with the dispatcher: the record being worked on, or NO_RECORD; and the stage, or
            NO_STAGE.
    """

    def __init__(
        self,
        link: socket.socket,
        data: Path,
        facts: dict[Split, DatasetFacts],
        own: Segment,
        at: npt.NDArray[np.int64],
    ) -> None:
        self._link, self._at = link, at[:1]
        self._stopwatch = Stopwatch(at[1:])
        self._records = {split: _reopen(data / f"{split}.lmdb", fact.fingerprint) for split, fact in facts.items()}
        self._own = own.reopen()
        self._segments: OrderedDict[str, Segment] = OrderedDict()

    def run(self) -> None:
        """Serve until the dispatcher is gone."""
        self._link.send(encode(Ready()))
        while packet := self._link.recv(MAX_PACKET_BYTES):
            lease = decode_lease(packet)
            self._link.send(encode(self._serve(lease)))

    def _serve(self, lease: Lease) -> Done | Bad:
        start = time.perf_counter()
        try:
            claim = self._write(lease)
        except RecordError as error:
            return Bad(lease.id, error.record, str(error), self._source(lease.split, error.record))
        except (SharedMemoryError, ValueError, KeyError) as error:
            return Bad(lease.id, NO_RECORD, str(error))
        finally:
            stages = self._stopwatch.stop()
            self._at[0] = NO_RECORD
        if claim is not Claim.OURS:
            return Bad(lease.id, NO_RECORD, STALE[claim])
        return Done(lease.id, time.perf_counter() - start, stages)

    def _write(self, lease: Lease) -> Claim:
        segment = self._segment(lease.segment)
        with segment.writing(lease.place.part, lease.place.generation) as claim:
            if claim is Claim.OURS:
                fill(_slice(segment, lease), self._records[lease.split], lease.what, self._at, self._stopwatch)
        return claim

    def _source(self, split: Split, record: int) -> str:
        try:
            return self._records[split].source(record)
        except RecordError:
            return ""

    def _segment(self, name: str) -> Segment:
        if not name:
            return self._own
        segment = self._segments.pop(name, None)
        if segment is None:
            segment = Segment.attach(name)
            while len(self._segments) >= _MAX_SEGMENTS:
                self._segments.popitem(last=False)[1].close()
        self._segments[name] = segment
        return segment


def _reopen(path: Path, fingerprint: str) -> Records:
    """Open a split that was surveyed before.

    Raises:
        DatasetInvalid: another dataset has taken its place, so that this worker would give other bytes than its elders.
    """
    records = Records(path)
    if records.manifest.fingerprint != fingerprint:
        raise DatasetInvalid(path, "it was replaced while this node serves it; start the node again")
    return records


def _slice(segment: Segment, lease: Lease) -> Slice:
    """The arrays of a lease's place; the segment checks that they lie within its data."""
    layout, place, n = SampleLayout(lease.what.view, lease.dtype), lease.place, lease.what.count
    view = layout.view
    return Slice(
        images=segment.array(place.images, (n, *view.shape), lease.dtype),
        labels=segment.array(place.labels, (n,), np.int64),
        draws=segment.array(place.draws, (n, *view.draws_shape), DRAWS),
    )
