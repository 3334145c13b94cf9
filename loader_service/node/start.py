"""Putting a node together: the datasets are surveyed, the fork server is forked, and then the dispatcher runs."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loader_service import defaults
from loader_service.metrics import NodeHook
from loader_service.node.dispatcher import Dispatcher, Settings
from loader_service.node.forkserver import ForkServer
from loader_service.node.worker import NO_RECORD, Worker, prove, survey
from loader_service.types import DatasetFacts, Split
from loader_service.wire.auth import node_keys
from loader_service.wire.shm import Segment

OnReady = Callable[[Dispatcher, dict[Split, DatasetFacts]], None]


def run_node(
    data: Path,
    *,
    workers: int,
    bind: str,
    version: str,
    on_ready: OnReady,
    keys: Path | None = None,
    insecure: bool = False,
    io_threads: int = defaults.CONNECTIONS,
    hook: NodeHook | None = None,
) -> None:
    """Run a node until it is told to stop. The calling process must have one thread.

    Args:
        data: directory of train.lmdb and val.lmdb; one of them may be missing.
        workers: how many worker processes.
        bind: address to listen at.
        version: of the package.
        on_ready: called when the node can serve, with the dispatcher and what it serves.
        keys: directory of the node's keys; without it only this machine may reach ``bind``.
        insecure: let other machines reach it without keys all the same.
        io_threads: of libzmq, which send slices to other machines.
        hook: handed the node's metrics twice a second; the first time after the workers' parent has been forked, so
            that it may start threads.

    Raises:
        LoaderServiceError: it cannot start or go on; see the sentence.
    """
    may_enter = node_keys(keys) if keys else None
    installation, facts = prove(), survey(data)
    shared = mmap.mmap(-1, workers * 2 * 8)  # anonymous and shared: the workers inherit it through both forks
    at = np.frombuffer(shared, np.int64).reshape(workers, 2)
    at[:] = NO_RECORD

    slots = defaults.SEND_SLOTS_PER_WORKER * workers + 1
    # Without a name, since only this node's processes use it; so it needs no room in /dev/shm and leaves nothing there.
    own = Segment.create(slots * defaults.SEND_SLOT_BYTES, slots, named=False, reserve=False)

    def worker_main(index: int, link: socket.socket) -> None:
        Worker(link, data, facts, own, at[index]).run()

    fork_server = ForkServer(worker_main)
    try:
        settings = Settings(bind, workers, send_slots=slots, keys=may_enter, insecure=insecure, io_threads=io_threads)
        dispatcher = Dispatcher(settings, facts, installation, fork_server, own, at, version)
    except BaseException:
        fork_server.close()
        raise
    dispatcher.run(lambda ready: on_ready(ready, facts), hook)
