"""The public class of the client: :class:`Loader`, an iterator over batches of images.

The caller's thread runs everything in this file. A session's thread talks to the nodes meanwhile and passes finished
batches through a queue; see :mod:`loader_service.client.session`.
"""

from __future__ import annotations

import gc
import logging
import queue
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service import defaults
from loader_service.client.buffers import Buffers
from loader_service.client.dataset import Dataset
from loader_service.client.plan import Schedule
from loader_service.client.protocol import Deliver, Finish, PendingBatch, Quarantined, Run, Transport
from loader_service.client.session import Delivery, Session
from loader_service.client.state import State
from loader_service.data import kernel
from loader_service.data.augment import complete_view
from loader_service.data.fill import slice_numbers, slice_sources
from loader_service.errors import NoNodeError, OptionError, SharedMemoryError, SlotsHeld
from loader_service.metrics import LoaderHook, LoaderMetrics
from loader_service.types import MAX_EXCLUDED, VIEWS, Dtype, EpochAccount, SampleLayout, SliceId, Split, View
from loader_service.wire.access import access
from loader_service.wire.messages import MAX_CONNECTIONS

log = logging.getLogger("loader_service.client")

_OVERHEAD_BYTES = 128
"""Room per slice in a send slot for alignment: its pixels and its labels end up to 63 bytes before a multiple of 64."""


class Batch(NamedTuple):
    """One batch of B samples. The arrays are views of a slot, which is reused once all of them are collected.

    Fields:
        images: (B, crop, crop, 3) uint8 RGB, or float16 or float32 minus the mean; ten-crop (B, 10, crop, crop, 3); whole
            (B, side, side, 3). For records of 256 pixels crop is 224 and side is 256.
        labels: (B,) int64, the class.
        ids: (B,) int64, the number of the record at each position of the order.
        sources: (B,) int64, the record that the pixels come from; differs from ids only where a bad record was replaced.
        draws: (B,) or (B, 10) struct of y, x, flip and shift (int16[3]); see :data:`loader_service.types.DRAWS`.
        epoch: the epoch, from 0.
        start: the position of the first sample in the epoch.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    draws: npt.NDArray[np.void]
    epoch: int
    start: int


class Loader:
    """An iterator over batches of augmented images, made by one node or many, in an order that only the seed decides.

    One ``for`` loop runs all remaining epochs. After a ``break``, the next loop continues with the next batch. Close the
    loader, or use it as a context manager.

    Args:
        address: a node's address, or several with commas between.
        split: ``train`` or ``val``.
        view: a name (``train``, ``center``, ``ten-crop``, ``whole``) or a :class:`View`.
        crop: side of the crops, in pixels. None takes that of a given View, and with a name 7/8 of the records' side
            (224 of 256).
        batch_size: samples per batch and rank.
        seed: decides the order and all augmentation; 0 .. 2**63 - 1.
        epochs: number of epochs.
        dtype: ``uint8`` pixels, or ``float16`` or ``float32`` minus the mean image. The latter take two or four times the
            bytes, and cost the nodes work that the trainer's device does almost for free.
        rank, world_size: this replica's part of each global batch.
        transport: ``shm`` or ``tcp`` to force one; ``auto`` shares memory with every node that can.
        drop_last: leave out an epoch's last batch if it is not full.
        prefetch: batches made ahead.
        timeout_s: seconds to wait for a node or a batch before an error is raised; None waits without limit and logs it.
        on_bad_sample: the response to a record that no node can read. ``fail`` raises an error that names the record;
            ``substitute`` uses another record's pixels, lists the bad one in :attr:`quarantine` and continues.
        max_bad: most records that may be replaced before an error is raised all the same.
        server_key: the file with the nodes' public key, or its 40 characters. Without keys, loopback addresses take the
            user's own (see docs/design/security.md), and addresses on other machines are refused.
        client_key: the file with this client's secret key.
        insecure: connect without keys, to nodes that were started with ``--insecure``.
        connections: TCP connections with each node that cannot share memory; each takes a core at either end.
        hook: called with the loader's :attr:`metrics` after each batch, in the caller's thread.

    Fields:
        dataset: the facts of the dataset.
        waited_s: seconds that ``next()`` has waited for batches.

    Raises:
        OptionError: an argument cannot work.
        NoNodeError: no node answered in time.
        NodeRefused, NodeFull, AddressError, MessageError: no address leads to a node that serves; this is the last reason.
        KeyRefused, KeyFileError: the node does not accept the keys, or they are missing or cannot be read.
        SharedMemoryError: there is not enough memory for the slots.
    """

    def __init__(
        self,
        address: str = defaults.ADDRESS,
        *,
        split: Split = "train",
        view: str | View = "train",
        crop: int | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int = 0,
        epochs: int = 1,
        dtype: Dtype = "uint8",
        rank: int = 0,
        world_size: int = 1,
        transport: Transport = "auto",
        drop_last: bool = False,
        prefetch: int = defaults.PREFETCH,
        timeout_s: float | None = None,
        on_bad_sample: Literal["fail", "substitute"] = "fail",
        max_bad: int = defaults.MAX_BAD,
        server_key: str | Path | None = None,
        client_key: str | Path | None = None,
        insecure: bool = False,
        connections: int = defaults.CONNECTIONS,
        hook: LoaderHook | None = None,
    ) -> None:
        _check_view(view)
        _check_choice("split", split, get_args(Split))
        _check_choice("dtype", dtype, get_args(Dtype))
        _check_choice("transport", transport, get_args(Transport))
        _check_choice("on_bad_sample", on_bad_sample, ("fail", "substitute"))
        _check_range("max_bad", max_bad, 0, MAX_EXCLUDED - 1)
        _check_range("batch_size", batch_size, 1, 2**16)
        _check_range("seed", seed, 0, 2**63 - 1)  # the bounds of SliceId.seed
        _check_range("epochs", epochs, 0, 2**31)
        _check_range("prefetch", prefetch, 1, 1024)
        _check_range("connections", connections, 1, MAX_CONNECTIONS)
        _check_range("world_size", world_size, 1, 2**16)
        _check_range("rank", rank, 0, world_size - 1)
        addresses = tuple(part.strip() for part in address.split(",") if part.strip())
        if not addresses:
            raise OptionError("address", address, "one or more addresses such as tcp://127.0.0.1:5555")
        keys = access(addresses, server_key, client_key, insecure=insecure)
        self._seed, self._transport, self._timeout_s, self._prefetch = seed, transport, timeout_s, prefetch
        replaced = max_bad if on_bad_sample == "substitute" else None  # None: the first bad record ends the run
        self._session = Session(addresses, split, replaced, keys, connections)  # its thread starts here
        # A finaliser closes a loader that is dropped without close(). It must not refer to the loader itself.
        self._close: weakref.finalize[..., Loader] = weakref.finalize(self, self._session.close)
        try:
            self._facts = self._session.wait_for_facts(timeout_s)  # blocks until the first node has answered
            self.dataset = Dataset.of(self._facts)
            self._view = complete_view(_view_of(view, crop, self.dataset.side), self.dataset.statistics)
            self._schedule = Schedule(self._facts.count, batch_size, rank, world_size, epochs, drop_last)
            self._buffers = self._make_buffers(
                SampleLayout(self._view, dtype), seed, batch_size, prefetch + defaults.SPARE_SLOTS
            )
        except BaseException:  # Ctrl-C, too: the session's thread must not stay
            self.close()
            raise
        self._close.detach()
        self._close = weakref.finalize(self, _close, self._session, self._buffers)  # now there are slots to close, too
        self._next = (0, 0)  # epoch and global position of the first batch not yet returned
        self._deliveries: queue.SimpleQueue[Delivery] | None = None
        self._held: set[int] = set()  # slots whose arrays the caller still has
        self._delivered: dict[int, int] = {}
        self._substituted: dict[int, int] = {}
        self._excluded: tuple[int, ...] = ()
        self._hook = hook
        self._batches = self._samples = 0
        self._used_s, self._returned_at = 0.0, 0.0
        self.waited_s = 0.0

    # Iteration

    def __len__(self) -> int:
        """Return the number of batches in one epoch."""
        return self._schedule.batches_left(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._deliveries is None:
            self._deliveries = self._begin()
        start = time.perf_counter()
        self._used_s += start - (self._returned_at or start)  # 0 until a batch was returned
        try:
            delivery = self._wait(self._deliveries)
        finally:  # also if a signal's handler interrupts the wait
            self._returned_at = time.perf_counter()
            self.waited_s += self._returned_at - start
        match delivery:
            case Deliver(batch):
                plan = batch.plan
                # A global position, so another number of ranks can resume.
                self._next = (plan.epoch, plan.next) if plan.next < self.dataset.count else (plan.epoch + 1, 0)
                self._delivered[plan.epoch] = self._delivered.get(plan.epoch, 0) + plan.count
                self._batches, self._samples = self._batches + 1, self._samples + plan.count
                assembled = self._assemble(batch)
                if self._hook:
                    self._hook(self.metrics)
                return assembled
            case Finish():
                self._deliveries.put(delivery)  # so that the next next() ends, too
                raise StopIteration
            case error:
                self._deliveries.put(error)  # so that the next next() raises it, too
                raise error

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place, the first position that ``next()`` has not returned, as plain values."""
        return self._state().plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place. Batch size, world size, transport and nodes may differ from the saved run's.

        Raises:
            StateError: the state was saved for another dataset, view or seed, or by another version.
        """
        resumed = self._state().resumed(state, self.dataset.count)
        self._excluded = resumed.exclusions
        self._next = (resumed.epoch, resumed.position)
        self._delivered, self._substituted = {}, {}
        self._deliveries = None  # the next call of next() begins a run at the saved place

    @property
    def view(self) -> View:
        """The view, completed with what it leaves to the dataset."""
        return self._view

    @property
    def ledger(self) -> list[EpochAccount]:
        """The account of each epoch begun so far; see :class:`EpochAccount`."""
        return [
            msgspec.structs.replace(
                account,
                delivered=self._delivered.get(account.epoch, 0),
                substituted=self._substituted.get(account.epoch, 0),
            )
            for account in self._session.accounts
        ]

    @property
    def quarantine(self) -> list[Quarantined]:
        """The records that this loader found bad and replaced, each with its source's name and the reason."""
        return self._session.quarantine

    @property
    def metrics(self) -> LoaderMetrics:
        """The uses of this loader's time and slots up to this moment."""
        # The session's thread goes on meanwhile, so the numbers may differ by a batch; hence the max below.
        accounts, filling = self.ledger, self._session.pending
        held, ready = len(self._held), self.ready
        return LoaderMetrics(
            batches=self._batches,
            samples=self._samples,
            delivered_bytes=self._samples * self._buffers.layout.sample_bytes,
            waited_s=self.waited_s,
            used_s=self._used_s,
            slots={
                "held": held,
                "ready": ready,
                "filling": filling,
                "free": max(0, self._buffers.slots - held - ready - filling),
            },
            duplicates_refused=sum(account.duplicates_refused for account in accounts),
            reassigned=sum(account.reassigned for account in accounts),
            substituted=sum(self._substituted.values()),
        )

    @property
    def ready(self) -> int:
        """Batches that ``next()`` would return without waiting; the end and an error count as one."""
        return self._deliveries.qsize() if self._deliveries else 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of all slots, the most memory that this loader's batches ever take."""
        return self._buffers.memory_bytes

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """All slots as one array (n,) uint8, for registering as pinned memory, not for reading."""
        return self._buffers.memory

    # Closing

    def close(self) -> None:
        """Leave the nodes and free the shared memory; batches in the caller's hands stay valid."""
        self._close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Inside

    def _state(self) -> State:
        epoch, position = self._next
        excluded = self._session.excluded if self._deliveries else None  # without deliveries, the run is an earlier one
        return State(
            epoch=epoch,
            position=position,
            seed=self._seed,
            view=self._view,
            fingerprint=self._facts.fingerprint,
            golden=self._facts.golden,
            exclusions=self._excluded if excluded is None else excluded,
        )

    def _make_buffers(self, layout: SampleLayout, seed: int, batch_size: int, slots: int) -> Buffers:
        # Samples per slice that a node can send in frames.
        fitting = (self._session.slot_bytes - _OVERHEAD_BYTES) // layout.sample_bytes
        if fitting < 1:
            raise OptionError(
                "view", layout.view.kind, f"samples that fit a send slot of {self._session.slot_bytes} bytes"
            )
        # Enough slices in the prefetched batches to keep every worker busy, and no more: each slice costs messages.
        fair = -(-batch_size * self._prefetch // (defaults.SLICES_PER_WORKER * self._session.workers))  # ceil
        # The last two are hard limits.
        slice_samples = min(max(fair, defaults.MIN_SLICE_SAMPLES), defaults.MAX_SLICE_SAMPLES, fitting, batch_size)

        def buffers(named: bool) -> Buffers:
            return Buffers(
                layout, seed, batch_size, slots=slots, slice_samples=slice_samples, named=named, copy=kernel.copy
            )

        if self._transport == "tcp":
            return buffers(named=False)
        try:
            return buffers(named=True)
        except SharedMemoryError as error:
            if self._transport == "shm":
                raise
            log.warning("%s Slices will come in frames instead.", error)
            return buffers(named=False)

    def _begin(self) -> queue.SimpleQueue[Delivery]:
        epoch, position = self._next
        run = Run(
            schedule=self._schedule,
            epoch=epoch,
            position=position,
            slots=self._buffers.slots,
            slice_samples=self._buffers.slice_samples,
            pixel_bytes=self._buffers.pixel_bytes,
            tail_bytes=self._buffers.tail_bytes,
            arm=self._buffers.arm,
            transport=self._transport,
            attach=self._buffers.attach,
            excluded=self._excluded,
        )
        return self._session.begin(self._buffers, run)

    def _wait(self, deliveries: queue.SimpleQueue[Delivery]) -> Delivery:
        try:
            return deliveries.get_nowait()  # the usual case: batches are made ahead
        except queue.Empty:
            pass
        if len(self._held) == self._buffers.slots:  # no batch can come, so waiting would never end
            gc.collect()  # frees arrays that are held only by reference cycles
            if len(self._held) == self._buffers.slots:
                raise SlotsHeld(self._buffers.slots)
        try:
            return deliveries.get(timeout=self._timeout_s)
        except queue.Empty:
            raise NoNodeError(self._session.addresses, self._timeout_s or 0.0, "no batch came") from None

    def _assemble(self, finished: PendingBatch) -> Batch:
        """Return a finished batch's arrays, with the ids and sources that its plan stands for."""
        plan, slot = finished.plan, finished.slot
        self._held.add(slot)  # before the arrays exist, since their release may come at once
        held, session = self._held, self._session  # not self: arrays may outlive the loader and must not keep it alive

        # Runs in any thread between any two instructions, see Hold: discard is atomic, slot_returned appends and wakes.
        def release(slot: int) -> None:
            held.discard(slot)
            session.slot_returned(slot)

        images, labels, draws = self._buffers.arrays(slot, plan.count, release)  # views of the slot, shapes as in Batch
        # Copied, so that the caller may write them: the order's table is cached and read-only.
        ids = slice_numbers(
            self.dataset.count, SliceId(self._view, self._seed, plan.epoch, plan.first, plan.count)
        ).copy()
        sources = ids.copy()
        for part in finished.parts:
            if part.excluded:
                what, where = self._buffers.slice_id(plan.epoch, part), slice(part.offset, part.offset + part.count)
                sources[where] = slice_sources(self.dataset.count, what)
                # Excluded records need not be in this slice, so count the samples that really were replaced.
                replaced = int(np.count_nonzero(sources[where] != ids[where]))
                self._substituted[plan.epoch] = self._substituted.get(plan.epoch, 0) + replaced
        return Batch(images, labels, ids, sources, draws, plan.epoch, plan.first)


def _close(session: Session, buffers: Buffers) -> None:
    session.close()  # first: its thread writes into the segment
    buffers.close()


def _check_view(view: str | View) -> None:
    """Raise OptionError unless this is a view or the name of one."""
    if not isinstance(view, View) and view not in VIEWS:
        raise OptionError("view", view, "a View, or the name of one: train, center, ten-crop, whole")


def _view_of(view: str | View, crop: int | None, side: int) -> View:
    """Return the view that is asked for, with its crop, for records of ``side`` pixels.

    Raises:
        OptionError: the crop is larger than the records, or the view has none.
    """
    chosen = view if isinstance(view, View) else View.named(view, side)
    if crop is not None and chosen.kind == "whole":
        raise OptionError("crop", crop, "no crop with the view whole, which shows all of a record")
    # A View may have the crop 0, which stands for 7/8 of the side; a crop that is given may not.
    least, wanted = (0, chosen.crop) if crop is None else (1, crop)
    if chosen.kind != "whole" and not least <= wanted <= side:
        raise OptionError("crop", wanted, f"1 to {side} pixels, the side of this dataset's records")
    return chosen if crop is None else msgspec.structs.replace(chosen, crop=crop)


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise OptionError unless the value is one of the choices."""
    if value not in choices:
        raise OptionError(option, value, " or ".join(choices))


def _check_range(option: str, value: object, low: int, high: int) -> None:
    """Raise OptionError unless the value is a whole number from ``low`` to ``high``."""
    # In Python True is an int.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(option, value, f"a whole number from {low} to {high}")
