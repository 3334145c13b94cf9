"""The processes of a run: one for each tower of each replica of the network, started by ``torchrun``.

::

    rank = replica * towers + tower          a mesh of two dimensions, data x tower

Processes of one replica are a pair: they exchange maps and gradients (``trainer.parallel.exchange``). Processes of one tower hold
equal weights: they add up their gradients. Small facts (who was stopped, how many images) go round among all of them, over
gloo; tensors on GPUs go over NCCL. A run that torchrun did not start is a world of one process, where nothing is said.

Nobody waits for data inside a collective of NCCL: processes first agree, over gloo, that everyone has its batch.

A process that dies takes the others with it: its connections close, whoever waits for it gets ``PeerLost`` and leaves, and
so does whoever waits for that one. torchrun starts all of them again, if ``--max-restarts`` lets it.
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError, DeviceError, PeerLost
from trainer.parallel.devices import choose_devices

_WAIT_TIMEOUT: Final = timedelta(days=1)
"""How long a process waits for another. A loader that is gone for the night is no failure; a process that has died is
noticed at once, by its connection."""

_START_TIMEOUT: Final = timedelta(minutes=10)
"""How long processes may take to start, from the first to the last."""

_RETRY_AFTER: Final = timedelta(seconds=1)

_TEXT_BYTES: Final = 1 << 14
"""The longest text that processes tell each other."""


@contextmanager
def _communication(what: str) -> Iterator[None]:
    """A block that talks to other processes; PeerLost if one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # both backends raise it, or its kin, for a connection that broke
        raise PeerLost(what, str(error)) from error


@dataclass(frozen=True)
class Pair:
    """The two processes of one replica, as one of them sees it.

    Fields:
        tower: which tower lives here.
        twin: rank of the other.
        group: of the two.
    """

    tower: int
    peer: int
    group: dist.ProcessGroup

    def send(self, tensor: Tensor) -> None:
        """Give the twin a contiguous tensor, which it ``receive``s."""
        with _communication("sending to its twin"):
            dist.send(tensor, self.peer, self.group)

    def receive(self, buffer: Tensor) -> Tensor:
        """Fill ``buffer``, contiguous, with what the twin sends; returns it."""
        with _communication("waiting for its twin"):
            dist.recv(buffer, self.peer, self.group)
        return buffer

    def swap(self, mine: Tensor) -> Tensor:
        """Give the twin a contiguous tensor and get its own, of the same shape and dtype."""
        theirs = torch.empty_like(mine)
        operations = [
            dist.P2POp(dist.isend, mine, self.peer, self.group),
            dist.P2POp(dist.irecv, theirs, self.peer, self.group),
        ]
        with _communication("swapping with its twin"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return theirs


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees it.

    Fields:
        devices: of the towers that live in this process.
        rank, size: which process this is, of how many.
        pair: this replica's two processes; None if all of its towers live here.
        data: the processes of this tower, one of each replica; None if there is one replica.
        machine: which of the run's machines this process is on.
    """

    devices: tuple[torch.device, ...]
    rank: int = 0
    size: int = 1
    pair: Pair | None = None
    data: dist.ProcessGroup | None = None
    machine: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to people."""
        return self.rank == 0

    @property
    def has_head(self) -> bool:
        """Whether tower 0 lives here, and with it fc8, the loss, and the replica's client of the loader."""
        return self.pair is None or self.pair.tower == 0

    @property
    def replica(self) -> int:
        """Which copy of the network this process is a part of."""
        return self.rank // (2 if self.pair else 1)

    @property
    def replicas(self) -> int:
        """How many copies of the network learn together."""
        return self.size // (2 if self.pair else 1)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """What every process said, by rank; all say equally many numbers. Waits for the last one."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with _communication("asking all others"):
            dist.all_gather(everyone, mine)
        return [row.tolist() for row in everyone]

    def gather_text(self, text: str) -> list[str]:
        """What every process tells, by rank; waits for the last one. At most 16 KiB of UTF-8."""
        content = text.encode()
        if len(content) > _TEXT_BYTES:
            raise ValueError(f"{len(content)} bytes are more than the {_TEXT_BYTES} that a process may tell")
        rows = self.gather([*content, *[0] * (_TEXT_BYTES - len(content))])
        return [bytes(int(byte) for byte in row).rstrip(b"\0").decode() for row in rows]

    def add_gradients(self, model: nn.Module) -> None:
        """Make every gradient the sum over the replicas; a process without images counts as zeros."""
        if self.data is None:
            return
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        with _communication("adding up gradients"):
            for work in [dist.all_reduce(gradient, group=self.data, async_op=True) for gradient in gradients]:
                work.wait()

    def merge_towers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of both towers, by name, in the process that ``is_first``; elsewhere just those given.

        The towers are alike, so tower 1's tensors have the names and shapes of tower 0's, but for the number.
        """
        together = {name: tensor.detach() for name, tensor in tensors.items()}
        if self.pair is None or self.replica != 0:
            return together
        for name in [name for name in together if name.startswith("towers.")]:
            tensor = together[name].contiguous()
            if self.pair.tower == 0:
                together[name.replace("towers.0.", "towers.1.", 1)] = self.pair.receive(torch.empty_like(tensor))
            else:
                self.pair.send(tensor)
        return together


@contextmanager
def join(asked: Sequence[str], towers: int) -> Iterator[World]:
    """Find the other processes of this run, for as long as the context lasts.

    Args:
        asked: the devices that the user named; under torchrun ``cpu`` or nothing.
        towers: of the network.

    Raises:
        ConfigError: not a whole number of networks, or devices named one by one.
        DeviceError: a device that this machine lacks.
        PeerLost: another process died before all had met.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:
        yield World(choose_devices(asked, towers))
        return
    device = _own_device(asked)
    if size % towers:
        raise ConfigError("--nproc-per-node", size, f"a multiple of {towers}: one process for each tower of a network")
    with _communication("looking for the others"):
        store, rank, _ = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
        store = PrefixStore(_agree_on_launch(store, rank, size), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_WAIT_TIMEOUT, store=store, rank=rank, world_size=size)
    try:
        with _communication("looking for the others"):
            mesh = init_device_mesh(device.type, (size // towers, towers), mesh_dim_names=("data", "tower"))
        pair = Pair(rank % towers, rank ^ 1, mesh.get_group("tower")) if towers == 2 else None
        data = mesh.get_group("data") if size > towers else None
        yield World((device,), rank, size, pair, data, int(os.environ.get("GROUP_RANK", "0")))
    finally:
        dist.destroy_process_group()


def leave(world: World) -> None:
    """End this process at once, with success, if it was one of several and has done and closed everything.

    Threads of torch's that a group leaves behind have been seen to abort the interpreter on its way out, which torchrun
    takes for a failure of the run.
    """
    if world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _agree_on_launch(store: Store, rank: int, size: int) -> str:
    """A word that the processes of this start have in common, and those of no other.

    torchrun's store outlives its restarts, with the addresses of the processes that died (pytorch issue 135712), and
    machines count their restarts apart. So rank 0 makes up a word and answers each of the others, who call it by that word and
    give one of their own: a word that nobody answers to is from an earlier start, and rank 0's is asked for again.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("word", mine)
        store.wait([f"{mine} from {other}" for other in range(1, size)], _START_TIMEOUT)
        for other in range(1, size):
            store.set(f"{mine} to {store.get(f'{mine} from {other}').decode()}", "welcome")
        return mine
    until_s = time.monotonic() + _START_TIMEOUT.total_seconds()
    while time.monotonic() < until_s:
        word: str = store.get("word").decode()
        store.set(f"{word} from {rank}", mine)
        try:
            store.wait([f"{word} to {mine}"], _RETRY_AFTER)
        except dist.DistStoreError:  # nobody answered in time
            continue
        return word
    raise PeerLost("looking for the others", f"rank 0 did not answer within {_START_TIMEOUT}")


def launch_id() -> str | None:
    """What stays the same when torchrun starts this run's processes again; None if torchrun has not started this one."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return run if run != "none" else f"torchrun {os.getppid()}"


def was_restarted() -> bool:
    """Whether torchrun has started this run's processes before, and one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _own_device(asked: Sequence[str]) -> torch.device:
    """This process's device: the GPU of its local rank, or the CPU."""
    if tuple(asked) not in ((), ("cpu",)):
        raise ConfigError("--devices", ",".join(asked), "cpu, or nothing: under torchrun each process takes a GPU")
    if asked or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise DeviceError(f"cuda:{local}", "there are fewer GPUs here than processes; lower --nproc-per-node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
