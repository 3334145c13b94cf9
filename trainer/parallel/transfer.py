"""Copies from one device to another, while both go on computing.

Between GPUs a copy has streams of its own, one at each end: it waits for nothing that its devices were told to do after
the tensor was made, and holds none of it up::

    source, computing   ── tensor made ──●────────────────────────────────────────▶
    source, sending                      └─ wait ─ copy ─┐
    target, receiving                                    └─ arrived ─┐
    target, computing   ─────────────────────────────────────────────●─ tensor used ▶

Rules of the file:

1. The sending stream waits for the computing one, or it would copy what is not computed yet. The receiver's computing
   stream waits for that one copy, not for all that were sent since, and only when the copy is about to be used.
2. Memory belongs to the stream that it was allocated on, and is given away when the tensor is let go of, whatever other
   streams still do with it. So a tensor is recorded on the second stream that uses it (pytorch issues 15568, 33909).
3. What arrives is allocated on the receiving stream. On the computing one it could lie where queued work still reads, and
   the copy would have to wait for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """A tensor on its way.

    Fields:
        tensor: the copy, whose numbers count after ``land``.
        target: the device that it lies on.
        arrived: when the numbers are there; None if they are already.
    """

    tensor: Tensor
    target: torch.device
    arrived: torch.cuda.Event | None = None

    def land(self) -> Tensor:
        """The copy, for the target's current stream to use: that stream waits, the caller does not."""
        if self.arrived is not None:
            computing = torch.cuda.current_stream(self.target)
            computing.wait_event(self.arrived)
            self.tensor.record_stream(computing)
        return self.tensor


class Route:
    """The way from one device to another.

    Args:
        source, target: where tensors come from, and where their copies go.
        through_host: whether copies between GPUs go through host memory instead of from peer to peer.
    """

    def __init__(self, source: torch.device, target: torch.device, through_host: bool = False) -> None:
        self._source, self._target, self._through_host = source, target, through_host
        self._between_gpus = source.type == target.type == "cuda"
        if self._between_gpus:
            self._sending = torch.cuda.Stream(device=source)  # type: ignore[no-untyped-call]
            self._receiving = torch.cuda.Stream(device=target)  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> Parcel:
        """Begin to copy a tensor that the source's current stream computes; of its shape, dtype and order of channels.

        With a CPU at either end the copy is complete when this returns.
        """
        if not self._between_gpus:
            return Parcel(tensor.to(self._target), self._target)
        self._sending.wait_stream(torch.cuda.current_stream(self._source))
        with torch.cuda.stream(self._sending), torch.cuda.stream(self._receiving):
            copy = self._copy(_packed(tensor))
            arrived = self._receiving.record_event()
        tensor.record_stream(self._sending)
        return Parcel(copy, self._target, arrived)

    def _copy(self, packed: Tensor) -> Tensor:
        """Copy on the two streams of this route, which are torch's current ones."""
        if not self._through_host:
            return packed.to(self._target, non_blocking=True)  # torch has the receiving stream wait for the sending one
        in_host = packed.to("cpu", non_blocking=True)  # pinned, and kept by torch until both streams have done with it
        self._receiving.wait_stream(self._sending)
        return in_host.to(self._target, non_blocking=True)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor in one piece, which an engine for copies moves by itself; kernels would take units from computation."""
    last = tensor.dim() == 4 and tensor.stride(1) == 1
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
