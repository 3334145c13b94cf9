"""The sum of gradients over processes: the numbers of one call per parameter, in buckets that leave during the backward pass.

As a program, this file is one of several processes; it fails if a number differs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from trainer.errors import PeerLost
from trainer.model.alexnet import AlexNet
from trainer.parallel import world as world_module
from trainer.parallel.gradients import GradientSum
from trainer.parallel.world import World, join, leave

IMAGES, CROP = 4, 64
NOTICED = 17


def backward(model: AlexNet, rank: int, number: int = 0) -> None:
    """Add the gradients of a batch of this rank's own."""
    pictures = torch.linspace(-100, 100, IMAGES * 3 * CROP * CROP).add(7 * rank + number).sin() * 100
    loss = functional.cross_entropy(model(pictures.view(IMAGES, 3, CROP, CROP)), torch.arange(IMAGES) % 3)
    torch.autograd.backward(loss)


def one_by_one(model: AlexNet, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the sum of the gradients by one call for each parameter, after the backward pass."""
    sums = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    for total in sums:
        dist.all_reduce(total, group=group)
    return sums


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yield a list that gets the size of each reduction, in bytes, when it starts."""
    started: list[int] = []
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **more: Any) -> Any:
        started.append(tensor.nbytes)
        return plain(tensor, *args, **more)

    dist.all_reduce = all_reduce
    try:
        yield started
    finally:
        dist.all_reduce = plain


def check(
    world: World, bucket_bytes: int, batches: Callable[[int], list[bool]], same: Callable[[Tensor, Tensor], bool]
) -> None:
    """Compare both ways to sum gradients; ``batches(r)`` tells which batches of an update have images in rank r."""
    assert world.data is not None
    models = [AlexNet(3, width=0.05, towers=1, crop=CROP, seed=1) for _ in range(2)]
    for model in models:
        model.train(False)  # without dropout
    plain, summed = models
    gradients = GradientSum(summed, world.data, bucket_bytes)
    for step in range(2):  # the second step uses the buckets again
        mine = batches(world.rank)
        for number, has_images in enumerate(mine):
            if has_images:
                backward(plain, world.rank, 10 * step + number)
        expected = one_by_one(plain, world.data)
        with counted() as started:
            for number, has_images in enumerate(mine):
                assert started == []
                with gradients.held() if number < len(mine) - 1 else nullcontext():
                    if has_images:
                        backward(summed, world.rank, 10 * step + number)
            in_time = len(started)
            gradients.finish()
        assert sum(started) == sum(p.nbytes for p in summed.parameters())
        assert in_time == (len(started) if mine[-1] else 0)  # all have left before the backward pass ends
        assert len(started) == (1 if bucket_bytes > sum(started) else 8 if bucket_bytes == 1 else len(started))
        for parameter, total in zip(summed.parameters(), expected, strict=True):
            assert parameter.grad is not None
            assert same(parameter.grad, total)
            assert parameter.grad.stride() == parameter.stride()
        for model in models:
            model.zero_grad(set_to_none=True)


def close(one: Tensor, other: Tensor) -> bool:
    """Return True if sums of four numbers, in any order, agree to float32's accuracy."""
    return bool(torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max())))


def run(ending: str) -> None:
    """Be one process of several."""
    torch.set_num_threads(1)
    with join(("cpu",), 1) as world:
        if ending == "killed":
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(PeerLost):
                world.gather([1.0])
            os._exit(NOTICED)
        same = torch.equal if world.size == 2 else close  # two numbers have one sum, whatever the order
        for bucket_bytes in (1, 1 << 16, 25 << 20):
            check(world, bucket_bytes, lambda rank: [True], same)
        check(world, 1 << 16, lambda rank: [True] * 3, same)  # accumulation: the sum leaves with the last batch
        check(world, 1 << 16, lambda rank: [rank % 2 == 1], same)  # some ranks' parts of a short last batch are empty
        check(world, 1 << 16, lambda rank: [True, True, rank % 2 == 1], same)  # and so with accumulation
    leave(world)


@pytest.mark.parametrize("count", [2, 4])
def test_buckets_give_the_sums_of_single_calls(processes: Any, count: int) -> None:
    """Also with accumulation, with ranks without images, and with buckets of any size; bit for bit in two processes."""
    for code, said in processes.together(count, Path(__file__).read_text(encoding="utf-8"), ""):
        assert code == 0, said


def test_one_process_sums_nothing() -> None:
    """Without a group no hook is set and no gradient changes."""
    model = AlexNet(3, width=0.05, towers=1, crop=CROP)
    gradients = GradientSum(model, None)
    backward(model, 0)
    before = [parameter.grad for parameter in model.parameters()]
    gradients.finish()
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), before, strict=True))


def test_a_killed_process_is_noticed_over_gloo(processes: Any) -> None:
    """The other one loses its connection, long before any timeout."""
    program = Path(__file__).read_text(encoding="utf-8")
    (code, said), (killed, _) = processes.together(2, program, "killed")
    assert killed == -signal.SIGKILL
    assert code == NOTICED, said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_nccl_gives_up_soon(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Groups for tensors on GPUs use NCCL and time out in two minutes; those for small facts use gloo and wait for a day."""
    groups: list[tuple[str, timedelta, list[list[int]]]] = []

    def new(ranks: list[list[int]], timeout: timedelta, backend: str) -> tuple[str, list[str]]:
        groups.append((backend, timeout, ranks))
        return f"{backend} {ranks}", []

    def init(backend: str, timeout: timedelta, **_: object) -> None:
        groups.append((backend, timeout, [list(range(4))]))

    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(world_module, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 2, 4)]))
    monkeypatch.setattr(world_module, "_agree_on_launch", lambda *_: "token")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    pairs, replicas = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    day, soon = timedelta(days=1), timedelta(minutes=2)
    with join((), 2) as world:
        assert world.pair is not None
        assert world.pair.host_group == f"gloo {pairs}"
        if device == "cpu":
            assert groups == [("gloo", day, [[0, 1, 2, 3]]), ("gloo", day, pairs), ("gloo", day, replicas)]
            assert world.pair.group == world.pair.host_group
        else:
            own = [("nccl", soon, pairs), ("nccl", soon, replicas)]
            assert groups == [("gloo", day, [[0, 1, 2, 3]]), ("gloo", day, pairs), *own]
            assert (world.pair.group, world.data) == (f"nccl {pairs}", f"nccl {replicas}")


if __name__ == "__main__":
    run(sys.argv[1])
