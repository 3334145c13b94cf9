"""The sum of the gradients of all replicas, in buckets that travel while the backward pass still computes.

The backward pass goes from fc8 to conv1, and so do the buckets: the fully connected layers, which have 96 % of the parameters,
are on their way while the convolutions compute, which take most of the time. A bucket is one block of memory and one call of
``all_reduce``. All processes start the buckets in the same order, whatever their own backward pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.parallel.world import communication

_BUCKET_BYTES: Final = 25 << 20
"""Size at which a bucket is closed: large enough that latency does not count, small enough that the first leaves early."""


class GradientSum:
    """The sum of a network's gradients over the processes of a group.

    Call ``finish`` after each backward pass, before the update. Between two updates the gradients must be dropped
    (``zero_grad(set_to_none=True)``); until then they are views of the buckets.

    Args:
        model: network of this process; hooks on its parameters start the buckets.
        group: processes whose gradients are summed, each with the same parameters; None if there is one, and nothing is done.
        bucket_bytes: size of a bucket. A layer is never divided, so a larger layer is a bucket of its own.

    Sums of two processes are those of one call for each parameter, bit for bit. With more, the place of a number in its
    bucket decides the order of its sum, so the last bits may differ.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, bucket_bytes: int = _BUCKET_BYTES) -> None:
        self._group, self._held, self._started = group, False, 0
        self._buckets: list[_Bucket] = []
        self._works: list[dist.Work] = []
        if group is None:
            return
        for parameters in _in_buckets(model, bucket_bytes):
            bucket = _Bucket(parameters)
            self._buckets.append(bucket)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start nothing in the backward passes inside the block, because more gradients will be added to theirs.

        For accumulation over several backward passes: all but the last one run in such a block.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def finish(self) -> None:
        """Replace every gradient by its sum over the processes; one without gradients contributes zeros.

        Raises:
            PeerLost: another process has died.
        """
        with communication("adding up gradients"):
            for bucket in self._buckets[self._started :]:  # without images there was no backward pass that started them
                bucket.take_all()
                self._start(bucket)
            for work in self._works:
                work.wait()
        self._works.clear()
        self._started = 0
        for bucket in self._buckets:
            bucket.arrived.clear()

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def arrive(parameter: Tensor) -> None:
            if self._held:
                return
            bucket.take(parameter)
            with communication("adding up gradients"):
                while self._started < len(self._buckets) and self._buckets[self._started].is_full:
                    self._start(self._buckets[self._started])

        return arrive

    def _start(self, bucket: _Bucket) -> None:
        work = dist.all_reduce(bucket.block, group=self._group, async_op=True)
        assert work is not None, "this process is not in the group"
        self._works.append(work)
        self._started += 1


class _Bucket:
    """The gradients of some parameters, one after the other in one block, each with its parameter's shape and strides."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        self.block = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self._views: dict[Tensor, Tensor] = {}
        self.arrived: set[Tensor] = set()
        start = 0
        for parameter in parameters:
            # A parameter's strides fill its memory without gaps, also channels-last, so the same strides fit the block.
            self._views[parameter] = self.block.as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()

    @property
    def is_full(self) -> bool:
        return len(self.arrived) == len(self._views)

    def take(self, parameter: Tensor) -> None:
        """Move a gradient into the block; no gradient is zero."""
        view = self._views[parameter]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad is not view:
            view.copy_(parameter.grad)
        parameter.grad = view
        self.arrived.add(parameter)

    def take_all(self) -> None:
        """Move the gradients that have not come yet."""
        for parameter in self._views:
            if parameter not in self.arrived:
                self.take(parameter)


def _in_buckets(model: nn.Module, bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Divide the parameters into buckets, the last layer first; a bucket has one dtype and one device."""
    bucket: list[nn.Parameter] = []
    size = 0
    for layer in reversed(list(model.modules())):
        mine = list(layer.parameters(recurse=False))
        if not mine:
            continue
        more = sum(p.nbytes for p in mine)
        kinds = {(p.dtype, p.device) for p in (*bucket, *mine)}
        if bucket and (size + more > bucket_bytes or len(kinds) > 1):
            yield bucket
            bucket, size = [], 0
        bucket += mine
        size += more
    if bucket:
        yield bucket
