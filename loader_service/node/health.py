"""Checks of a machine before a node starts on it. Each returns a result and, where one is needed, a remedy."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import zmq

from loader_service import defaults
from loader_service.errors import LoaderServiceError, OptionError
from loader_service.node.worker import prove, survey
from loader_service.types import SampleLayout, View
from loader_service.wire import sockets
from loader_service.wire.access import keys_to_serve, own_folder
from loader_service.wire.shm import DIRECTORY

DESCRIPTORS: Final = 128
"""Open files of a dispatcher without its workers: sockets, segments, and the connections of some dozens of clients."""

DESCRIPTORS_PER_WORKER: Final = 4
"""Open files per worker: both ends of its socket pair, a pidfd, and a spare one while a dead worker is replaced."""

CGROUP: Final = Path("/sys/fs/cgroup")


class CheckState(StrEnum):
    """Results of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Fields:
        what: the subject of the check.
        state: the result.
        found: the facts that led to it.
        remedy: the action that would help; empty if none is needed.
    """

    what: str
    state: CheckState
    found: str
    remedy: str = ""


def check_dataset(data: Path) -> Check:
    """Check that a dataset exists, and that this machine makes the same samples of it as the machine that wrote it."""
    try:
        facts = survey(data)
    except LoaderServiceError as error:
        return Check("dataset", CheckState.FAILED, str(error))
    found = ", ".join(f"{split} ({f.count:,} records)" for split, f in facts.items())
    return Check("dataset", CheckState.OK, f"{found}; output check passed (16 samples of each)")


def check_samples() -> Check:
    """Check that this installation makes the same samples of the built-in images as every other node."""
    try:
        made = prove()
    except LoaderServiceError as error:
        return Check("samples", CheckState.FAILED, str(error))
    return Check("samples", CheckState.OK, f"output check passed (hash {made.golden}); {made}")


def check_cpus(workers: int) -> Check:
    """Check that there is a CPU for each worker."""
    cpus = available_cpus()
    found = f"{workers} workers for {cpus:g} CPUs"
    if workers > cpus:
        return Check("CPUs", CheckState.WARNING, found, f"more workers than CPUs; use --workers {max(1, int(cpus))}")
    return Check("CPUs", CheckState.OK, found)


def available_cpus(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPUs that this process may use: those of its affinity, or fewer if a cgroup (v1 or v2) sets a quota.

    Args:
        root: mount point of the cgroup file systems.
        membership: file that lists the cgroups of this process.
    """
    cpus = float(len(os.sched_getaffinity(0)))  # not cpu_count: taskset and cpusets narrow it
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    # In a container the own cgroup is mounted at the root; on a host it lies below.
    for path in {root / "cpu.max", root / own / "cpu.max"}:  # a set: in a container both may be one path
        if path.exists():
            quota, period = path.read_text().split()  # microseconds of CPU time per period, or "max"
            cpus = min(cpus, int(quota) / int(period)) if quota != "max" else cpus
    # Version 1 has a file for each; a quota of -1 is none.
    quota_path, period_path = root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"
    if quota_path.exists() and (limit := int(quota_path.read_text())) > 0:
        cpus = min(cpus, limit / int(period_path.read_text()))
    return cpus


def check_shared_memory(directory: Path = DIRECTORY) -> Check:
    """Check that /dev/shm has room for a loader with default options. A node's own slots need no room there."""
    what = "shared memory"
    # Bytes of all slots, as Buffers makes them, but for rounding to pages.
    need = (defaults.PREFETCH + defaults.SPARE_SLOTS) * defaults.BATCH_SIZE * SampleLayout(View(), "uint8").sample_bytes
    remedy = f"give {directory} {need / 2**20:,.0f} MiB (docker run --shm-size; mount -o remount,size=...)"
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return Check(what, CheckState.FAILED, f"{directory} cannot be used ({error.strerror})", remedy)
    if not os.access(directory, os.W_OK):
        return Check(what, CheckState.FAILED, f"{directory} cannot be written", f"mount it writable, and {remedy}")
    found = f"{directory} has {free / 2**20:,.0f} MiB free, a loader with batches of {defaults.BATCH_SIZE} needs"
    found += f" {need / 2**20:,.0f}"
    if free < need:  # no failure: a loader with transport auto falls back to frames
        return Check(
            what,
            CheckState.WARNING,
            f"{found}: loaders on this machine will receive slices in frames, not in shared memory",
            remedy,
        )
    return Check(what, CheckState.OK, found)


def check_descriptors(workers: int) -> Check:
    """Check that the dispatcher may open as many files and sockets as it needs."""
    need = DESCRIPTORS + DESCRIPTORS_PER_WORKER * workers
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # a node raises the soft limit to the hard one
    found = f"the limit is {limit}, {need} are needed"
    if limit != resource.RLIM_INFINITY and limit < need:  # RLIM_INFINITY is -1, below every need
        return Check("open files", CheckState.FAILED, found, f"raise the limit: ulimit -n {need}")
    return Check("open files", CheckState.OK, "there is no limit" if limit == resource.RLIM_INFINITY else found)


def check_keys(directory: Path | None, bind: str) -> Check:
    """Check that the node's keys exist and are private, or that it needs none. The user's own are made, as a start would."""
    try:
        keys = keys_to_serve(bind, directory)
        if keys is None:
            return Check("keys", CheckState.OK, f"none needed: no other user can reach {bind}")
        where = directory or own_folder()
    except OptionError as error:
        remedy = "run `loader-service keygen DIR`, and start with --keys DIR"
        return Check("keys", CheckState.FAILED, str(error), remedy)
    except LoaderServiceError as error:
        return Check("keys", CheckState.FAILED, str(error))
    return Check("keys", CheckState.OK, f"{where} is private and allows {len(keys.allowed)} clients")


def check_address(bind: str) -> Check:
    """Check that a node can listen at the address."""
    context = zmq.Context()
    try:
        router, address = sockets.bind_node(context, bind)  # check_keys reports missing keys
        router.close()  # before term(), which waits for open sockets
    except LoaderServiceError as error:
        remedy = f"check for a running node with `loader-service status {bind}`, or choose another --bind"
        return Check("address", CheckState.FAILED, str(error), remedy)
    finally:
        context.term()
    return Check("address", CheckState.OK, f"{address} is free")
