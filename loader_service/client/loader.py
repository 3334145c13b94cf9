"""The public class of the client: :class:`Loader`, a source of batches of images, epoch by epoch.

The caller's thread runs everything in this file. A session's thread talks to the nodes meanwhile and passes finished
batches on; see :mod:`loader_service.client.session`, and :mod:`loader_service.client.epochs` for the loops.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service import defaults
from loader_service.client.buffers import Buffers
from loader_service.client.dataset import Dataset
from loader_service.client.delivery import Claim, Deliveries
from loader_service.client.epochs import Books, Epochs, Step
from loader_service.client.plan import Place, Schedule
from loader_service.client.protocol import PendingBatch, Quarantined, Run, Transport
from loader_service.client.session import Session
from loader_service.client.state import State
from loader_service.client.world import AUTO, check_world, this_world
from loader_service.data import kernel
from loader_service.data.augment import complete_view
from loader_service.data.fill import slice_numbers, slice_sources
from loader_service.errors import LoaderForked, NoNodeError, OptionError, SharedMemoryError, SlotsHeld
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

    def __repr__(self) -> str:
        """Return the shapes and dtypes, not the pixels."""
        arrays = (f"{name}={a.dtype if name != 'draws' else 'struct'} {a.shape}" for name, a in zip(self._fields, self[:5], strict=False))  # fmt: skip
        return f"Batch({', '.join(arrays)}, epoch={self.epoch}, start={self.start})"


class _Made(NamedTuple):
    """A batch that is on offer: from which delivery, and the claim to its slot."""

    delivery: PendingBatch
    claim: Claim


class Loader(Epochs[Batch, _Made, Deliveries]):
    """A source of batches of augmented images, made by one node or many, in an order that only the seed decides.

    One ``for`` loop is one epoch, and the next loop is the next epoch; batches are prefetched across the boundary.
    After a ``break``, or after an exception such as KeyboardInterrupt in the loop, the next loop is the next epoch, too, and
    the ledger counts what was left out. To continue an epoch instead, keep its iterator (``it = iter(loader)``) and loop over
    that again, or use :meth:`all_epochs`: no exception, wherever it is raised, costs them a batch. Close the loader, or use
    it as a context manager.

    A loader is for one thread at a time and for the process that opened it. Any number of loaders may be open in a process.

    Args:
        address: a node's address, or several with commas between.
        split: ``train`` or ``val``.
        view: a name (``train``, ``center``, ``ten-crop``, ``whole``) or a :class:`View`.
        crop: side of the crops, in pixels. None takes that of a given View, and with a name 7/8 of the records' side
            (224 of 256).
        batch_size: samples per batch and rank: with 4 ranks, an optimiser's step sees 4 times as many.
        seed: decides the order and all augmentation; 0 .. 2**63 - 1.
        epochs: number of epochs, after which a loop is an error; None for no end.
        dtype: ``uint8`` pixels, or ``float16`` or ``float32`` minus the mean image. The latter take two or four times the
            bytes, and cost the nodes work that the trainer's device does almost for free.
        rank, world_size: this replica's part of each global batch. ``rank="auto"`` takes both from torch.distributed or
            jax.distributed if that is initialised, else from the environment variables RANK and WORLD_SIZE, else 0 of 1. Left out, they are 0 of 1, with a
            warning if there is evidence of more ranks, which would all get the same data.
        transport: ``shm`` or ``tcp`` to force one; ``auto`` shares memory with every node that can.
        drop_last: leave out an epoch's last global batch if it is not full.
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
        dtype: as given.
        rank, world_size: as given, or as found.
        waited_s: seconds that ``next()`` has waited for batches.

    Raises:
        OptionError: an argument cannot work, or the loader would repeat its data in each worker of a DataLoader; in a loop's
            first step: ``rank="auto"`` was given before the ranks were known.
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
        epochs: int | None = None,
        dtype: Dtype = "uint8",
        rank: int | Literal["auto"] | None = None,
        world_size: int | None = None,
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
        if epochs is not None:
            _check_range("epochs", epochs, 0, 2**31)
        _check_range("prefetch", prefetch, 1, 1024)
        _check_range("connections", connections, 1, MAX_CONNECTIONS)
        if rank not in (None, AUTO):
            _check_range("rank", rank, 0, 2**16)
        if world_size is not None:
            _check_range("world_size", world_size, 1, 2**16)
        self.rank, self.world_size = this_world(rank, world_size)
        self._check_world = partial(check_world, rank, world_size, (self.rank, self.world_size))
        _check_range("rank", self.rank, 0, self.world_size - 1)
        addresses = tuple(part.strip() for part in address.split(",") if part.strip())
        if not addresses:
            raise OptionError("address", address, "one or more addresses such as tcp://127.0.0.1:5555")
        keys = access(addresses, server_key, client_key, insecure=insecure)
        self._seed, self._transport, self._timeout_s, self._prefetch = seed, transport, timeout_s, prefetch
        self._hook = hook
        self.dtype: Dtype = dtype
        self._used_s, self._returned_at = 0.0, 0.0
        self.waited_s = 0.0
        replaced = max_bad if on_bad_sample == "substitute" else None  # None: the first bad record ends the run
        self._session = Session(addresses, split, replaced, keys, connections)
        # A finaliser closes a loader that is dropped without close(). It must not refer to the loader itself.
        self._finalizer = weakref.finalize(self, self._session.close)
        try:
            self._session.start()
            self._facts = self._session.wait_for_facts(timeout_s)  # blocks until the first node has answered
            self.dataset = Dataset.of(self._facts)
            self._view = complete_view(_view_of(view, crop, self.dataset.side), self.dataset.statistics)
            count = self._facts.count
            schedule = _schedule(count, batch_size, self.rank, self.world_size, epochs, drop_last)
            super().__init__(schedule, Books(Place(0, 0), Place(0, 0)))
            self._buffers = self._make_buffers(
                SampleLayout(self._view, dtype), seed, batch_size, prefetch + defaults.SPARE_SLOTS
            )
        except BaseException:  # Ctrl-C, too: the session's thread must not stay
            self.close()
            raise

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place, the first position that has not been returned, as plain values."""
        return self._state(self._books).plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place: the next loop is the rest of its epoch, or the next epoch if nothing is left of it.

        Batch size, world size, transport and nodes may differ from the saved run's. The ledger starts anew. A loop in progress
        gets IteratorReplaced.

        Raises:
            StateError: the state was saved for another dataset, view or seed, or by another version.
        """
        books = self._books
        resumed = self._state(books).resumed(state, self.dataset.count)
        place = Place(resumed.epoch, resumed.position)
        self._turn = None
        self._set(Books(place, place, resumed.exclusions, batches=books.batches, samples=books.samples))

    @property
    def view(self) -> View:
        """The view, completed with what it leaves to the dataset."""
        return self._view

    @property
    def ledger(self) -> list[EpochAccount]:
        """The account of each epoch of which a batch was returned; see :class:`EpochAccount`."""
        return self._ledger(self._books)

    @property
    def quarantine(self) -> list[Quarantined]:
        """The records that this loader found bad and replaced, each with its source's name and the reason."""
        return self._session.quarantine

    @property
    def metrics(self) -> LoaderMetrics:
        """The uses of this loader's time and slots up to this moment."""
        return self._metrics(self._books)

    @property
    def ready(self) -> int:
        """Batches that the next calls return without waiting."""
        step = self._step
        if step.lane is None:
            return 0
        taken = step.source and step.key not in self._offers and step.lane.is_first(step.source.delivery)
        return len(step.lane) - (1 if taken else 0)

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
        """Leave the nodes and free the shared memory; batches in the caller's hands stay valid.

        Any thread may call it: a thread that waits for a batch then gets LoaderClosed.
        """
        self._session.close()
        self._finalizer.detach()  # last: a close() that is interrupted is made up for

    def __reduce__(self) -> NoReturn:
        raise LoaderForked(self._session.pid, None)  # its connections and slots cannot be copied

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Inside: the parts of Epochs

    def _check(self) -> None:
        process = os.getpid()
        if self._session.pid != process:
            raise LoaderForked(self._session.pid, process)
        self._session.check_open()

    def _begin(self, books: Books) -> Deliveries:
        self._check_world()
        run = Run(
            schedule=self._schedule,
            epoch=books.place.epoch,
            position=books.place.position,
            slots=self._buffers.slots,
            slice_samples=self._buffers.slice_samples,
            pixel_bytes=self._buffers.pixel_bytes,
            tail_bytes=self._buffers.tail_bytes,
            arm=self._buffers.arm,
            transport=self._transport,
            attach=self._buffers.attach,
            excluded=books.excluded,
            continues=bool(books.epochs),
        )
        return self._session.begin(run)

    def _fetch(self, lane: Deliveries) -> tuple[_Made, Batch, Books]:
        start = time.perf_counter()
        self._used_s += start - (self._returned_at or start)  # 0 until a batch was returned
        try:
            self._session.take_back_slots()
            delivery = self._wait(lane)
        finally:  # also if a signal's handler interrupts the wait
            self._returned_at = time.perf_counter()
            self.waited_s += self._returned_at - start
        try:
            hold = self._buffers.hold(delivery.slot)
        except AttributeError:
            self._check()  # another thread has closed the loader, and so the segment, since the check in _make_step
            raise
        claim = self._session.holds.claim(hold, delivery.slot)  # kept once the batch is on offer
        images, labels, draws = self._buffers.arrays(hold, delivery.plan.count)  # views of the slot, shapes as in Batch
        ids, sources = self._numbers(delivery)
        batch = Batch(images, labels, ids, sources, draws, delivery.plan.epoch, delivery.plan.first)
        substituted = int(np.count_nonzero(ids != sources))
        return (
            _Made(delivery, claim),
            batch,
            self._step.after.returned(delivery.plan, self._schedule.after(delivery.plan), substituted),
        )

    def _drop(self, lane: Deliveries, source: _Made) -> None:
        lane.drop(source.delivery)

    def _hand_over(self, step: Step[_Made, Deliveries]) -> None:
        assert step.source is not None
        self._session.holds.keep(step.source.claim)
        if self._hook:
            self._hook(self._metrics(step.after))

    def _adopt(self, books: Books) -> None:
        """Take over the books of a wrapper, and keep what is prefetched if they are at this loader's place."""
        step = self._step
        # An offer that was not taken goes with its slot, so that its batch must be made again.
        if step.lane is None or step.key in self._offers or books.place != step.after.place:
            self._set(books)
        else:
            if step.source is not None:
                self._drop(step.lane, step.source)
            self._step = Step(books, books, lane=step.lane)
        self._offers.clear()

    def _excluded_now(self) -> tuple[int, ...]:
        step = self._step
        found = self._session.excluded if step.lane is not None else None  # without a lane, the run is an earlier one
        return step.after.excluded if found is None else found

    # Inside: more

    def _state(self, books: Books) -> State:
        return State(
            epoch=books.place.epoch,
            position=books.place.position,
            seed=self._seed,
            view=self._view,
            fingerprint=self._facts.fingerprint,
            golden=self._facts.golden,
            exclusions=self._excluded_now(),
        )

    def _ledger(self, books: Books) -> list[EpochAccount]:
        accounts = {account.epoch: account for account in self._session.accounts}
        return [
            msgspec.structs.replace(
                accounts.get(epoch, EpochAccount(epoch, 0)),
                delivered=counts.delivered,
                substituted=counts.substituted,
                left_out=counts.left_out,
            )
            for epoch, counts in sorted(books.epochs.items())
        ]

    def _metrics(self, books: Books) -> LoaderMetrics:
        # The session's thread goes on meanwhile, so the numbers may differ by a batch; hence the max below.
        accounts, filling, step = self._session.accounts, self._session.pending, self._step
        held, ready = len(self._session.holds), 0
        if step.lane is not None:
            # The batch on offer, or taken last, is still in its lane, but its slot is held.
            ready = len(step.lane) - (1 if step.source and step.lane.is_first(step.source.delivery) else 0)
        return LoaderMetrics(
            batches=books.batches,
            samples=books.samples,
            delivered_bytes=books.samples * self._buffers.layout.sample_bytes,
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
            substituted=sum(counts.substituted for counts in books.epochs.values()),
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
            return self._session.allocate(
                lambda: Buffers(
                    layout, seed, batch_size, slots=slots, slice_samples=slice_samples, named=named, copy=kernel.copy
                )
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

    def _wait(self, deliveries: Deliveries) -> PendingBatch:
        delivery = deliveries.first()
        if delivery is not None:  # the usual case: batches are made ahead
            return delivery
        holds, slots = self._session.holds, self._buffers.slots
        if len(holds) == slots:  # no batch can come, so waiting would never end
            gc.collect()  # frees arrays that are held only by reference cycles
            if len(holds) == slots:
                raise SlotsHeld(slots)
            self._session.take_back_slots()
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while (delivery := deliveries.first()) is None:
            left_s = -1 if deadline is None else max(0.0, deadline - time.monotonic())
            if not deliveries.wait(left_s):
                raise NoNodeError(self._session.addresses, self._timeout_s or 0.0, "no batch came")
        return delivery

    def _numbers(self, finished: PendingBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the ids and sources that a batch's plan stands for, (B,) int64 each."""
        plan = finished.plan
        # Copied, so that the caller may write them: the order's table is cached and read-only.
        ids = slice_numbers(
            self.dataset.count, SliceId(self._view, self._seed, plan.epoch, plan.first, plan.count)
        ).copy()
        sources = ids.copy()
        for part in finished.parts:
            if part.excluded:
                what, where = self._buffers.slice_id(plan.epoch, part), slice(part.offset, part.offset + part.count)
                sources[where] = slice_sources(self.dataset.count, what)
        return ids, sources


def _schedule(count: int, batch_size: int, rank: int, world_size: int, epochs: int | None, drop_last: bool) -> Schedule:
    """Return the batches of a run; raise OptionError if an epoch would have none."""
    schedule = Schedule(count, batch_size, rank, world_size, epochs, drop_last)
    if not schedule.batches_left(0):
        raise OptionError(
            "drop_last",
            drop_last,
            f"False with {count} records, of which no full batch of {batch_size} for each of {world_size} ranks can be made",
        )
    return schedule


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
