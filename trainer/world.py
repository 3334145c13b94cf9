"""The processes of a run: one for each tower of each replica of the network, started by ``torchrun``.

::

    rank = replica * towers + tower          a mesh of two dimensions, data x tower

Processes of one replica are a pair: they exchange maps and gradients (``trainer.exchange``). Processes of one tower hold
equal weights: they add up their gradients. Small facts (who was stopped, how many images) go round among all of them, over
gloo; tensors on GPUs go over NCCL. A run that torchrun did not start is a world of one process, where nothing is said.

Nobody waits for data inside a collective of NCCL: processes first agree, over gloo, that everyone has its batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from trainer.devices import choose_devices
from trainer.errors import ConfigError, DeviceError

_PATIENCE: Final = timedelta(days=1)
"""How long a process waits for another. A loader that is gone for the night is no failure; a process that has died is
noticed at once, by its connection."""


@dataclass(frozen=True)
class Pair:
    """The two processes of one replica, as one of them sees it.

    Fields:
        tower: which tower lives here.
        twin: rank of the other.
        group: of the two.
    """

    tower: int
    twin: int
    group: dist.ProcessGroup

    def send(self, tensor: Tensor) -> None:
        """Give the twin a contiguous tensor, which it ``receive``s."""
        dist.send(tensor, self.twin, self.group)

    def receive(self, room: Tensor) -> Tensor:
        """Fill ``room``, contiguous, with what the twin sends; returns it."""
        dist.recv(room, self.twin, self.group)
        return room

    def swap(self, mine: Tensor) -> Tensor:
        """Give the twin a contiguous tensor and get its own, of the same shape and dtype."""
        theirs = torch.empty_like(mine)
        operations = [
            dist.P2POp(dist.isend, mine, self.twin, self.group),
            dist.P2POp(dist.irecv, theirs, self.twin, self.group),
        ]
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
    """

    devices: tuple[torch.device, ...]
    rank: int = 0
    size: int = 1
    pair: Pair | None = None
    data: dist.ProcessGroup | None = None

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
        dist.all_gather(everyone, mine)
        return [row.tolist() for row in everyone]

    def add_gradients(self, model: nn.Module) -> None:
        """Make every gradient the sum over the replicas; a process without images counts as zeros."""
        if self.data is None:
            return
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, group=self.data, async_op=True) for gradient in gradients]:
            work.wait()

    def bring_together(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:
        yield World(choose_devices(asked, towers))
        return
    device = _own_device(asked)
    if size % towers:
        raise ConfigError("--nproc-per-node", size, f"a multiple of {towers}: one process for each tower of a network")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        mesh = init_device_mesh(device.type, (size // towers, towers), mesh_dim_names=("data", "tower"))
        rank = dist.get_rank()
        pair = Pair(rank % towers, rank ^ 1, mesh.get_group("tower")) if towers == 2 else None
        data = mesh.get_group("data") if size > towers else None
        yield World((device,), rank, size, pair, data)
    finally:
        dist.destroy_process_group()


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
