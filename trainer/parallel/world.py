"""The processes of a run: one for each tower of each replica of the network, started by ``torchrun``.

::

    rank = replica * towers + tower

The processes of one replica are a pair: they exchange maps and gradients (``trainer.parallel.exchange``). The processes of
one tower hold equal weights and add up their gradients (``trainer.parallel.gradients``). Small facts (stop requests, numbers
of images) are gathered from all processes over gloo; tensors on GPUs travel over NCCL. Without torchrun the world is one
process, and nothing is sent.

No process waits for data inside a collective of NCCL: all processes first agree, over gloo, that each has its batch. So gloo
may wait for a night, and NCCL, which does not notice that a peer is dead, for two minutes only.

The death of one process ends all: its connections close, so a process that waits for it gets ``PeerLost`` and exits, and
so on. torchrun starts all of them again, as often as ``--max-restarts`` allows.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError, DeviceError, PeerLost
from trainer.parallel.devices import choose_devices

_WAIT_TIMEOUT: Final = timedelta(days=1)
"""Time that a process waits for another over gloo. A node may be down for a night; a dead process is noticed at once, by
its connection."""

_NCCL_TIMEOUT: Final = timedelta(minutes=2)
"""Time that an operation of NCCL may take. Its kernels wait for a dead peer without end, so NCCL's watchdog ends this process
instead. No step takes so long, and compiling, which does take a minute, is done by all processes at the same time."""

_START_TIMEOUT: Final = timedelta(minutes=10)
"""Time between the starts of the first and the last process."""

_RETRY_AFTER: Final = timedelta(seconds=1)
"""Time for rank 0 to answer, before the others read its token again."""

_TEXT_BYTES: Final = 1 << 14
"""Longest text that ``gather_text`` sends."""


@contextmanager
def communication(doing: str) -> Iterator[None]:
    """Raise ``PeerLost`` if communication inside the block fails, because another process has died."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise it, or a subclass, for a broken connection
        raise PeerLost(doing, str(error)) from error


@dataclass(frozen=True)
class Pair:
    """The two processes of one replica, as one of them sees it.

    Fields:
        tower: number of the tower in this process.
        peer: rank of the other process.
        group: process group of the two for tensors on their devices.
        host_group: process group of the two for tensors in host memory; the same on CPUs.
    """

    tower: int
    peer: int
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    def send(self, tensor: Tensor) -> None:
        """Send a contiguous tensor to the peer, which calls ``receive``."""
        with communication("sending to its peer"):
            dist.send(tensor, self.peer, self._group_of(tensor))

    def receive(self, buffer: Tensor) -> Tensor:
        """Receive a tensor from the peer into ``buffer``, which is contiguous; return ``buffer``."""
        with communication("waiting for its peer"):
            dist.recv(buffer, self.peer, self._group_of(buffer))
        return buffer

    def swap(self, mine: Tensor) -> Tensor:
        """Send a contiguous tensor to the peer and return the peer's, of the same shape and dtype."""
        theirs = torch.empty_like(mine)
        # One batch of both operations: two blocking sends would wait for each other.
        operations = [
            dist.P2POp(dist.isend, mine, self.peer, self._group_of(mine)),
            dist.P2POp(dist.irecv, theirs, self.peer, self._group_of(mine)),
        ]
        with communication("exchanging with its peer"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return theirs

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup:
        return self.host_group if tensor.device.type == "cpu" else self.group


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees it.

    Fields:
        devices: devices of the towers in this process.
        rank, size: number of this process, and number of processes.
        pair: the two processes of this replica; None if this process has all towers.
        data: process group of this tower, one process of each replica; None with one replica.
        machine: number of the machine that this process runs on.
    """

    devices: tuple[torch.device, ...]
    rank: int = 0
    size: int = 1
    pair: Pair | None = None
    data: dist.ProcessGroup | None = None
    machine: int = 0

    @property
    def is_first(self) -> bool:
        """True in the process that writes files and console."""
        return self.rank == 0

    @property
    def has_head(self) -> bool:
        """True in a process with tower 0, which also has fc8, the loss, and the replica's client of the loader."""
        return self.pair is None or self.pair.tower == 0

    @property
    def replica(self) -> int:
        """Number of the network's copy that this process is a part of."""
        return self.rank // (2 if self.pair else 1)

    @property
    def replicas(self) -> int:
        """Number of copies of the network that train together."""
        return self.size // (2 if self.pair else 1)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, by rank; all give equally many. Waits for the last process."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)  # exact for integers up to 2^53
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with communication("gathering from all processes"):
            dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def gather_text(self, text: str) -> list[str]:
        """Return the text of every process, by rank; at most 16 KiB of UTF-8 each. Waits for the last process."""
        content = text.encode()
        if len(content) > _TEXT_BYTES:
            raise ValueError(f"the text has {len(content)} bytes; at most {_TEXT_BYTES} can be gathered")
        rows = self.gather([*content, *[0] * (_TEXT_BYTES - len(content))])  # all_gather needs equal sizes
        return [bytes(int(byte) for byte in row).rstrip(b"\0").decode() for row in rows]

    def merge_towers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of both towers, by name, in the first process; elsewhere return those given.

        Tower 1's tensors have the names and shapes of tower 0's except for the tower's number, so no shape is sent.
        """
        together = {name: tensor.detach() for name, tensor in tensors.items()}
        if self.pair is None or self.replica != 0:  # all replicas have equal weights; the first one sends
            return together
        for name in [name for name in together if name.startswith("towers.")]:
            tensor = together[name].contiguous()  # gloo and NCCL need it; names are in the same order in both processes
            if self.pair.tower == 0:
                together[name.replace("towers.0.", "towers.1.", 1)] = self.pair.receive(torch.empty_like(tensor))
            else:
                self.pair.send(tensor)
        return together


@contextmanager
def join(asked: Sequence[str], towers: int) -> Iterator[World]:
    """Join the other processes of this run, for as long as the context lasts.

    Args:
        asked: device names given by the user; under torchrun ``cpu`` or nothing.
        towers: towers of the network, 1 or 2.

    Raises:
        ConfigError: the processes do not make whole networks, or the user named single devices.
        DeviceError: a device that this machine lacks.
        PeerLost: another process died before all had joined.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:  # not under torchrun, or alone under it
        yield World(choose_devices(asked, towers))
        return
    device = _own_device(asked)  # before the group: NCCL uses the current device
    if size % towers:
        raise ConfigError("--nproc-per-node", size, f"a multiple of {towers}: one process for each tower of a network")
    with communication("joining the other processes"):
        store, rank, _ = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
        store = PrefixStore(_agree_on_launch(store, rank, size), store)
        dist.init_process_group("gloo", timeout=_WAIT_TIMEOUT, store=store, rank=rank, world_size=size)
    try:
        with communication("joining the other processes"):
            pair = data = None
            if towers == 2:
                pairs = [[first, first + 1] for first in range(0, size, 2)]
                host = _own_group(pairs, torch.device("cpu"))
                pair = Pair(rank % 2, rank ^ 1, _own_group(pairs, device) if device.type == "cuda" else host, host)
            if size > towers:
                data = _own_group([list(range(tower, size, towers)) for tower in range(towers)], device)
        yield World((device,), rank, size, pair, data, int(os.environ.get("GROUP_RANK", "0")))
    finally:
        dist.destroy_process_group()


def _own_group(groups: list[list[int]], device: torch.device) -> dist.ProcessGroup:
    """Divide all processes into groups of ranks, for tensors on ``device``, and return this process's own group."""
    backend, timeout = ("nccl", _NCCL_TIMEOUT) if device.type == "cuda" else ("gloo", _WAIT_TIMEOUT)
    own: dist.ProcessGroup | None
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout, backend=backend)  # type: ignore[no-untyped-call]
    assert own is not None, "every rank is in one of the groups"
    return own


def leave(world: World) -> None:
    """Exit this process at once with code 0, if it is one of several; call this when everything is closed.

    Threads that torch leaves behind after a process group have aborted the interpreter during its normal exit. torchrun
    would report that as a failure of the run.
    """
    if world.size > 1:
        # os._exit skips the interpreter's own flush.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _agree_on_launch(store: Store, rank: int, size: int) -> str:
    """Return a token that is common to the processes of this start and different at every other start.

    torchrun's store survives restarts and still has the addresses of dead processes (pytorch issue 135712), and each
    machine counts restarts separately. So rank 0 draws a token and answers every process that calls it by that token and
    a token of its own. A token that gets no answer is from an earlier start; then rank 0's is read again.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("token", mine)
        store.wait([f"{mine} from {other}" for other in range(1, size)], _START_TIMEOUT)
        for other in range(1, size):
            store.set(f"{mine} to {store.get(f'{mine} from {other}').decode()}", "welcome")
        return mine
    until_s = time.monotonic() + _START_TIMEOUT.total_seconds()
    while time.monotonic() < until_s:
        token: str = store.get("token").decode()
        store.set(f"{token} from {rank}", mine)
        try:
            store.wait([f"{token} to {mine}"], _RETRY_AFTER)
        except dist.DistStoreError:  # no answer in time: the token is old
            continue
        return token
    raise PeerLost("joining the other processes", f"rank 0 did not answer within {_START_TIMEOUT}")


def launch_id() -> str | None:
    """Return an id of the torchrun launch, which survives its restarts; None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return (
        run if run != "none" else f"torchrun {os.getppid()}"
    )  # "none" is torchrun's default, the same for all launches


def was_restarted() -> bool:
    """Return True if torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _own_device(asked: Sequence[str]) -> torch.device:
    """Return this process's device: the GPU of its local rank, or the CPU."""
    if tuple(asked) not in ((), ("cpu",)):
        raise ConfigError(
            "--devices", ",".join(asked), "cpu, or no --devices: under torchrun each process takes one GPU"
        )
    if asked or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise DeviceError(f"cuda:{local}", "this machine has fewer GPUs than processes; lower --nproc-per-node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
