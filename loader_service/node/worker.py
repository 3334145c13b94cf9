"""A worker process: it fills the bytes of a place with a slice.

The fork server forks it. It opens the datasets, then reads leases from its end of a socket pair until the dispatcher
closes the other end. Before each record, it publishes the record's number in memory shared with the dispatcher, so that
the record is known even after SIGKILL. This file also has the checks that a node makes before it starts workers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.data import golden
from loader_service.data.checksums import Checked
from loader_service.data.fill import Stopwatch, fill
from loader_service.data.records import Records
from loader_service.errors import DatasetInvalid, DatasetNotFound, NodeFailed, RecordError, SharedMemoryError
from loader_service.node.packets import MAX_PACKET_BYTES, Bad, Done, Lease, Ready, decode_order, encode
from loader_service.types import BUILTIN_GOLDEN, DRAWS, DatasetFacts, Installation, SampleLayout, Slice, Split
from loader_service.wire.shm import Claim, Segment

log = logging.getLogger("loader_service.node")

SPLITS: Final[tuple[Split, ...]] = ("train", "val")
NO_RECORD: Final = -1
"""Published while a worker reads no record."""

STALE: Final = {
    Claim.BUSY: "a late writer holds the part",
    Claim.GIVEN_UP: "the part's generation is no longer the lease's",
}
"""Reasons why a worker did not write a place. The client requests the slice again if it still needs it."""

_PR_SET_PDEATHSIG: Final = 1  # from <linux/prctl.h>


def prove() -> Installation:
    """Check that this installation makes the samples of the built-in images that every node must make.

    Returns:
        The hash of those samples, and the versions of the libraries that made them.

    Raises:
        NodeFailed: the hash differs, so that every client would refuse this node.
    """
    try:
        made = golden.installation()
    except ValueError as error:
        raise NodeFailed(f"a built-in image cannot be decoded, so records cannot be either: {error}") from error
    if made.golden != BUILTIN_GOLDEN:
        raise NodeFailed(
            f"its golden hash of the built-in images is {made.golden} with {made}, but {BUILTIN_GOLDEN} is expected: "
            "clients would refuse the samples; install the versions in constraints.txt"
        )
    return made


def survey(data: Path) -> dict[Split, DatasetFacts]:
    """Read the facts of the splits in ``data``, and check the golden hash of each.

    Raises:
        DatasetNotFound: the directory has no split.
        DatasetInvalid, DatasetUnfinished: a split cannot be served.
    """
    facts: dict[Split, DatasetFacts] = {}
    for split in SPLITS:
        path = data / f"{split}.lmdb"
        if not path.exists():
            continue
        with Records(path) as records:  # closed before the fork: an LMDB environment must not cross one
            manifest = records.manifest
            _check_golden(records)  # before the node starts: clients refuse a node with another hash
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


def share_checked(facts: dict[Split, DatasetFacts]) -> dict[Split, Checked]:
    """Return memory, by split, in which all processes that are forked later note which records they compared."""
    return {split: Checked(each.count) for split, each in facts.items()}


def _check_golden(records: Records) -> None:
    """Raise DatasetInvalid if this machine makes other samples of a dataset than the machine that wrote it.

    A bad record is no error here: only a client may exclude one.
    """
    need = records.manifest.golden
    try:
        made = golden.of_dataset(records)
    except RecordError as error:
        log.warning("The golden samples cannot be checked, because the record of one is bad. %s", error)
        return
    if made != need:
        raise DatasetInvalid(
            records.path,
            f"the hash of its golden samples is {made} here and {need} in its manifest: the records are damaged, or the "
            "libraries of this machine decode them to other bytes",
        )


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, also by SIGKILL."""
    # prctl(2): it counts when the thread that forked ends; here that is a thread that lives as long as its process.
    # CDLL(None) is the C library that is loaded already.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the prctl
        os._exit(1)


class Worker:
    """The loop of a worker process.

    Args:
        link: its end of the socket pair with the dispatcher.
        data: directory of the splits.
        facts: the facts of each split that the node sends to clients; a split that was replaced since is not served.
        checked: by split, the raw records that a worker of this node has compared with their checksums, inherited.
        own: the node's send slots, inherited.
        progress: (2,) int64 in memory shared with the dispatcher: the record that is read now (NO_RECORD: none) and the
            index of the stage (Stage.NONE: none).
    """

    def __init__(
        self,
        link: socket.socket,
        data: Path,
        facts: dict[Split, DatasetFacts],
        checked: dict[Split, Checked],
        own: Segment,
        progress: npt.NDArray[np.int64],
    ) -> None:
        self._link, self._record = link, progress[:1]  # a view: fill and the kernel publish record numbers in it
        self._stopwatch = Stopwatch(progress[1:])
        self._records = {
            split: _reopen(data / f"{split}.lmdb", fact.fingerprint, checked[split]) for split, fact in facts.items()
        }
        self._own = own.reopen()  # locks exclude openings, and all workers inherited the same one
        self._segments: dict[str, Segment] = {}  # of clients, by name, until the dispatcher has them released

    def run(self) -> None:
        """Carry out orders until the dispatcher closes its end."""
        self._link.send(encode(Ready()))
        while packet := self._link.recv(MAX_PACKET_BYTES):  # blocks; an empty packet is the end of file
            order = decode_order(packet)
            if isinstance(order, Lease):
                self._link.send(encode(self._serve(order)))
            elif segment := self._segments.pop(order.segment, None):
                segment.close()

    def _serve(self, lease: Lease) -> Done | Bad:
        start = time.perf_counter()
        try:
            # May wait for the disk for any time; the dispatcher watches the published record.
            claim = self._write(lease)
        except RecordError as error:  # the record is bad; the client decides whether to exclude it
            return Bad(lease.id, error.record, str(error), self._source(lease.split, error.record))
        except (SharedMemoryError, ValueError, KeyError) as error:  # the request is wrong, not a record
            return Bad(lease.id, NO_RECORD, str(error))
        finally:  # also after an error: a worker without a lease must not look as if it read a record
            stages = self._stopwatch.stop()
            self._record[0] = NO_RECORD
        if claim is not Claim.OURS:
            return Bad(lease.id, NO_RECORD, STALE[claim])
        return Done(lease.id, time.perf_counter() - start, stages)

    def _write(self, lease: Lease) -> Claim:
        """Write a slice into its place if the lease is still valid."""
        segment = self._segment(lease.segment)
        # The lock is held until the last byte is written.
        with segment.writing(lease.to.part, lease.to.generation) as claim:
            if claim is Claim.OURS:
                fill(_slice(segment, lease), self._records[lease.split], lease.what, self._record, self._stopwatch)
        return claim

    def _source(self, split: Split, record: int) -> str:
        try:
            return self._records[split].source(record)
        except RecordError:
            return ""

    def _segment(self, name: str) -> Segment:
        """Return a segment by its name, mapped once and kept: a new mapping would fault every page in again."""
        if not name:  # a slice in frames: the place is in the node's own send slots
            return self._own
        segment = self._segments.get(name)
        if segment is None:
            segment = self._segments[name] = Segment.attach(name)
        return segment


def _reopen(path: Path, fingerprint: str, checked: Checked) -> Records:
    """Open a split that was surveyed before.

    Raises:
        DatasetInvalid: another dataset replaced it, so that this worker would make other bytes than the earlier ones.
    """
    records = Records(path, checked=checked)  # opened after the fork, in the process that uses it
    if records.manifest.fingerprint != fingerprint:
        raise DatasetInvalid(path, "it was replaced while this node serves it; restart the node")
    return records


def _slice(segment: Segment, lease: Lease) -> Slice:
    """Return the arrays of a lease's destination. Segment.array checks that they lie within the data."""
    layout, to, n = SampleLayout(lease.what.view, lease.dtype), lease.to, lease.what.count
    view = layout.view
    return Slice(
        images=segment.array(to.images, (n, *view.shape), lease.dtype),
        labels=segment.array(to.labels, (n,), np.int64),
        draws=segment.array(to.draws, (n, *view.draws_shape), DRAWS),
    )
