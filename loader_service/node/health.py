"""Whether a node would run here, and well: each check gives one line, with a remedy where one is needed."""

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
from loader_service.errors import LoaderServiceError
from loader_service.node.worker import prove, survey
from loader_service.types import SampleLayout, View
from loader_service.wire import sockets
from loader_service.wire.auth import node_keys
from loader_service.wire.shm import DIRECTORY

DESCRIPTORS: Final = 128
"""What a dispatcher opens beside its workers' links: sockets, segments, and a connection for each of dozens of clients."""

DESCRIPTORS_PER_WORKER: Final = 4
"""Both ends of a link, a pidfd, and one to spare while a dead worker is replaced."""

CGROUP: Final = Path("/sys/fs/cgroup")


class State(StrEnum):
    """Results of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, what was found, and what to do about it."""

    what: str
    state: State
    found: str
    remedy: str = ""


def check_dataset(data: Path) -> Check:
    """Whether there is a dataset, and it makes the samples here that its writer had."""
    try:
        facts = survey(data)
    except LoaderServiceError as error:
        return Check("dataset", State.FAILED, str(error))
    found = ", ".join(f"{split} ({f.count:,} records)" for split, f in facts.items())
    return Check("dataset", State.OK, f"{found}; sixteen samples of each come out as they must")


def check_samples() -> Check:
    """Whether this installation makes the samples of the built-in pictures that every node must make."""
    try:
        made = prove()
    except LoaderServiceError as error:
        return Check("samples", State.FAILED, str(error))
    return Check("samples", State.OK, f"the built-in pictures' golden hash is {made.golden}, as it must be; {made}")


def check_cpus(workers: int) -> Check:
    """Whether each worker has a processor of its own."""
    cpus = available_cpus()
    found = f"{workers} workers for {cpus:g} CPUs"
    if workers > cpus:
        return Check("CPUs", State.WARNING, found, f"more workers than CPUs only switch: --workers {max(1, int(cpus))}")
    return Check("CPUs", State.OK, found)


def available_cpus(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float:
    """Processors that this process may use: those of its affinity, or fewer if a cgroup (v1 or v2) has a quota.

    Args:
        root: where cgroups are mounted.
        membership: which cgroups this process is in.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for path in {root / "cpu.max", root / own / "cpu.max"}:
        if path.exists():
            quota, period = path.read_text().split()
            cpus = min(cpus, int(quota) / int(period)) if quota != "max" else cpus
    quota_path, period_path = root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"
    if quota_path.exists() and (limit := int(quota_path.read_text())) > 0:
        cpus = min(cpus, limit / int(period_path.read_text()))
    return cpus


def check_shared_memory(directory: Path = DIRECTORY) -> Check:
    """Whether there is room for a loader with default options; a node's own slots do not lie there."""
    what = "shared memory"
    need = (defaults.PREFETCH + defaults.SPARE_SLOTS) * defaults.BATCH_SIZE * SampleLayout(View(), "uint8").sample_bytes
    remedy = f"give {directory} {need / 2**20:,.0f} MiB (docker run --shm-size; mount -o remount,size=...)"
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return Check(what, State.FAILED, f"{directory} cannot be used ({error.strerror})", remedy)
    found = f"{directory} has {free / 2**20:,.0f} MiB free, a loader with batches of {defaults.BATCH_SIZE} needs"
    found += f" {need / 2**20:,.0f}"
    if free < need:
        return Check(what, State.WARNING, f"{found}: loaders on this machine will get slices in frames", remedy)
    return Check(what, State.OK, found)


def check_descriptors(workers: int) -> Check:
    """Whether the dispatcher may open as many files and sockets as it needs."""
    need = DESCRIPTORS + DESCRIPTORS_PER_WORKER * workers
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{limit} may be open, {need} are needed"
    if limit != resource.RLIM_INFINITY and limit < need:
        return Check("open files", State.FAILED, found, f"raise the limit: ulimit -n {need}")
    return Check("open files", State.OK, "any number may be open" if limit == resource.RLIM_INFINITY else found)


def check_keys(directory: Path | None, bind: str) -> Check:
    """Whether the node's keys are there and private, where it needs any."""
    try:
        sockets.check_address(bind)
        if directory is None:
            if sockets.is_local(bind):
                return Check("keys", State.OK, f"none are needed: only this machine can reach {bind}")
            return Check(
                "keys", State.FAILED, f"others can reach {bind}", "loader-service keygen DIR, and start with --keys DIR"
            )
        allowed = len(node_keys(directory).allowed)
    except LoaderServiceError as error:
        return Check("keys", State.FAILED, str(error))
    return Check("keys", State.OK, f"{directory} is private, and allows {allowed} clients")


def check_address(bind: str) -> Check:
    """Whether a node could listen there."""
    context = zmq.Context()
    try:
        router, address = sockets.bind_node(context, bind, insecure=True)  # whether it may is what the keys' check says
        router.close()
    except LoaderServiceError as error:
        remedy = f"`loader-service status {bind}` tells whether a node is there already; or choose another --bind"
        return Check("address", State.FAILED, str(error), remedy)
    finally:
        context.term()
    return Check("address", State.OK, f"{address} is free")
