"""The public class: an iterable of batches. Where the arrays of a batch are put together."""

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
from loader_service.client.actions import Batch as MadeBatch
from loader_service.client.actions import Deliver, Finish
from loader_service.client.buffers import Buffers
from loader_service.client.dataset import Dataset
from loader_service.client.ledger import Ledger
from loader_service.client.options import check_choice, check_range, check_view, view_of
from loader_service.client.plan import Schedule
from loader_service.client.quarantine import Quarantined
from loader_service.client.session import Delivery, Session
from loader_service.client.state import State
from loader_service.data import kernel
from loader_service.data.augment import complete_view
from loader_service.data.fill import slice_numbers, slice_sources
from loader_service.errors import NoNodeError, OptionError, SharedMemoryError, SlotsHeld
from loader_service.metrics import LoaderHook, LoaderMetrics
from loader_service.types import MAX_EXCLUDED, Dtype, EpochAccount, SampleLayout, SliceId, Split, View
from loader_service.wire.auth import chosen_keys
from loader_service.wire.messages import MAX_CONNECTIONS

log = logging.getLogger("loader_service.client")

Transport = Literal["auto", "shm", "tcp"]


class Batch(NamedTuple):
    """What a training loop receives. The arrays are views of a slot, which is used again once all of them are gone.

    Fields:
        images: (B, crop, crop, 3) uint8 RGB, or float16 or float32 minus the mean; ten-crop (B, 10, crop, crop, 3); whole
            (B, side, side, 3). Of usual records crop is 224 and side 256.
        labels: (B,) int64, the class.
        ids: (B,) int64, the record number that the position stands for.
        sources: (B,) int64, the record whose pixels these are; differs only where a bad record was replaced.
        draws: (B,) or (B, 10) struct: y, x, flip, shift (int16[3]).
        epoch: which epoch.
        start: the position of the first sample in it.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    draws: npt.NDArray[np.void]
    epoch: int
    start: int


class Loader:
    """Batches of augmented images from one node or many, in an order that depends on nothing but the seed.

    One ``iter()`` runs all the epochs that remain; a loop that was left goes on with the next one. Close it, or use it
    as a context manager.

    Args:
        address: of a node, or several with commas between.
        split: ``train`` or ``val``.
        view: a name (``train``, ``center``, ``ten-crop``, ``whole``) or a :class:`View`.
        crop: side of the crops, in pixels; None takes a View's own, and with a name 7/8 of the records' side: 224 of 256.
        batch_size: samples per batch and rank.
        seed: decides the order and all augmentation; 0 .. 2**63 - 1.
        epochs: how many.
        dtype: ``uint8`` pixels, or ``float16`` or ``float32`` with the mean's window subtracted: two or four times the
            bytes to move, and the node's work where the trainer's device would do it in passing.
        rank, world_size: this replica's part of each global batch.
        transport: ``shm`` or ``tcp`` to force one; ``auto`` shares memory where it can.
        drop_last: leave out an epoch's last batch if it is not full.
        prefetch: batches made ahead.
        timeout_s: how long to wait for a node or a batch before it is an error; None waits for ever, and says so.
        on_bad_sample: what to do about a record that no node can read: ``fail`` stops with the record named;
            ``substitute`` shows another's pixels in its place, names it in :attr:`quarantine` and goes on.
        max_bad: how many records may be replaced before it is an error all the same.
        server_key: for nodes with keys: the file with the node's public key, or its 40 characters.
        client_key: for nodes with keys: the file with this client's secret key.
        connections: with each node on another machine; each takes a core at either end.
        hook: handed the loader's :attr:`metrics` after each batch, in the caller's thread.

    Raises:
        OptionError: an argument cannot work.
        NoNodeError: no node answered in time.
        NodeRefused: a node would give other bytes.
        KeyRefused, KeyFileError: the keys do not open the node, or cannot be read.
        SharedMemoryError: there is no room for the slots.
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
        connections: int = defaults.CONNECTIONS,
        hook: LoaderHook | None = None,
    ) -> None:
        check_view(view)
        check_choice("split", split, get_args(Split))
        check_choice("dtype", dtype, get_args(Dtype))
        check_choice("transport", transport, get_args(Transport))
        check_choice("on_bad_sample", on_bad_sample, ("fail", "substitute"))
        check_range("max_bad", max_bad, 0, MAX_EXCLUDED - 1)
        check_range("batch_size", batch_size, 1, 2**16)
        check_range("seed", seed, 0, 2**63 - 1)
        check_range("epochs", epochs, 0, 2**31)
        check_range("prefetch", prefetch, 1, 1024)
        check_range("connections", connections, 1, MAX_CONNECTIONS)
        check_range("world_size", world_size, 1, 2**16)
        check_range("rank", rank, 0, world_size - 1)
        addresses = tuple(part.strip() for part in address.split(",") if part.strip())
        if not addresses:
            raise OptionError("address", address, "one or more addresses such as tcp://127.0.0.1:5555")
        keys = chosen_keys(server_key, client_key)
        self._seed, self._transport, self._timeout_s, self._prefetch = seed, transport, timeout_s, prefetch
        replaced = max_bad if on_bad_sample == "substitute" else None
        self._session = Session(addresses, split, replaced, keys, connections)
        self._close: weakref.finalize[..., Loader] = weakref.finalize(self, self._session.close)
        try:
            self._facts = self._session.wait_for_facts(timeout_s)
            self.dataset = Dataset.of(self._facts)
            self._view = complete_view(view_of(view, crop, self.dataset.side), self.dataset.statistics)
            self._schedule = Schedule(self._facts.count, batch_size, rank, world_size, epochs, drop_last)
            self._buffers = self._make_buffers(
                SampleLayout(self._view, dtype), seed, batch_size, prefetch + defaults.SPARE_SLOTS
            )
        except BaseException:
            self.close()
            raise
        self._close.detach()
        self._close = weakref.finalize(self, _close, self._session, self._buffers)
        self._next = (0, 0)  # epoch and global position of the first batch not yet returned
        self._deliveries: queue.SimpleQueue[Delivery] | None = None
        self._held: set[int] = set()
        self._delivered: dict[int, int] = {}
        self._substituted: dict[int, int] = {}
        self._excluded: tuple[int, ...] = ()
        self._hook = hook
        self._batches = self._samples = 0
        self._used_s, self._returned_at = 0.0, 0.0
        self.waited_s = 0.0

    # Iteration

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self._schedule.batches_left(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._deliveries is None:
            self._deliveries = self._begin()
        start = time.perf_counter()
        self._used_s += start - (self._returned_at or start)
        delivery = self._wait(self._deliveries)
        self._returned_at = time.perf_counter()
        self.waited_s += self._returned_at - start
        match delivery:
            case Deliver(batch):
                plan = batch.plan
                self._next = (plan.epoch, plan.next) if plan.next < self.dataset.count else (plan.epoch + 1, 0)
                self._delivered[plan.epoch] = self._delivered.get(plan.epoch, 0) + plan.count
                self._batches, self._samples = self._batches + 1, self._samples + plan.count
                assembled = self._assemble(delivery.batch)
                if self._hook:
                    self._hook(self.metrics)
                return assembled
            case Finish():
                self._deliveries.put(delivery)  # asked once more, the answer stays the same
                raise StopIteration
            case error:
                self._deliveries.put(error)
                raise error

    # State

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: the first position that ``next()`` has not returned. Plain values only."""
        return self._state().plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; any batch size, world size, transport or set of nodes will do.

        Raises:
            StateError: it was saved for another dataset, view or seed, or by another version.
        """
        resumed = self._state().resumed(state, self.dataset.count)
        self._excluded = resumed.exclusions
        self._next = (resumed.epoch, resumed.position)
        self._delivered, self._substituted = {}, {}
        self._deliveries = None

    @property
    def view(self) -> View:
        """The view, with everything filled in that it leaves to the dataset."""
        return self._view

    @property
    def ledger(self) -> list[EpochAccount]:
        """The account of each epoch begun so far; see :class:`EpochAccount`."""
        ledger = self._session.ledger
        accounts = ledger.accounts if ledger else []
        return [
            msgspec.structs.replace(
                account,
                delivered=self._delivered.get(account.epoch, 0),
                substituted=self._substituted.get(account.epoch, 0),
            )
            for account in accounts
        ]

    @property
    def quarantine(self) -> list[Quarantined]:
        """The records that were found bad by this loader and replaced, each with its source's name and why."""
        return list(self._session.quarantine.records)

    @property
    def metrics(self) -> LoaderMetrics:
        """Where this loader's time goes, and what its slots are in use for, now."""
        ledger, accounts = self._session.ledger, self.ledger
        held, ready = len(self._held), self._deliveries.qsize() if self._deliveries else 0
        filling = ledger.open if ledger else 0
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
    def memory_bytes(self) -> int:
        """Most memory that this loader's batches ever take: all its slots."""
        return self._buffers.memory_bytes

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """All slots as one array, (memory_bytes of data,) uint8; for registering it as pinned memory, not for reading."""
        return self._buffers.memory

    # Closing

    def close(self) -> None:
        """Leave the nodes and give the shared memory back; batches that are out stay valid."""
        self._close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Inside

    def _state(self) -> State:
        epoch, position = self._next
        ledger = self._session.ledger if self._deliveries else None  # an earlier run's is of no interest
        return State(
            epoch=epoch,
            position=position,
            seed=self._seed,
            view=self._view,
            fingerprint=self._facts.fingerprint,
            golden=self._facts.golden,
            exclusions=ledger.excluded if ledger else self._excluded,
        )

    def _make_buffers(self, layout: SampleLayout, seed: int, batch_size: int, slots: int) -> Buffers:
        fitting = self._session.slot_bytes // (layout.sample_bytes + 64)
        if fitting < 1:
            raise OptionError(
                "view", layout.view.kind, f"samples that fit a send slot of {self._session.slot_bytes} bytes"
            )
        # Enough slices in the prefetched batches to keep every worker busy, and no more: each costs a few messages.
        fair = -(-batch_size * self._prefetch // (defaults.SLICES_PER_WORKER * self._session.workers))
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

        def new_ledger(slots: list[int], numbers: Iterator[int]) -> Ledger:
            return Ledger(
                self._schedule,
                epoch,
                position,
                slots=slots,
                slice_samples=self._buffers.slice_samples,
                arm=self._buffers.arm,
                numbers=numbers,
                patience_s=defaults.NODE_STILL_S,
                excluded=self._excluded,
            )

        return self._session.begin(self._buffers, self._transport, new_ledger)

    def _wait(self, deliveries: queue.SimpleQueue[Delivery]) -> Delivery:
        try:
            return deliveries.get_nowait()
        except queue.Empty:
            pass
        if len(self._held) == self._buffers.slots:
            gc.collect()  # arrays in reference cycles are not really held
            if len(self._held) == self._buffers.slots:
                raise SlotsHeld(self._buffers.slots)
        try:
            return deliveries.get(timeout=self._timeout_s)
        except queue.Empty:
            raise NoNodeError(self._session.addresses, self._timeout_s or 0.0, "no batch came") from None

    def _assemble(self, made: MadeBatch) -> Batch:
        plan, slot = made.plan, made.slot
        self._held.add(slot)
        held, session = self._held, self._session

        def release(slot: int) -> None:
            held.discard(slot)
            session.slot_returned(slot)

        images, labels, draws = self._buffers.arrays(slot, plan.count, release)
        ids = slice_numbers(
            self.dataset.count, SliceId(self._view, self._seed, plan.epoch, plan.first, plan.count)
        ).copy()
        sources = ids.copy()
        for part in made.parts:
            if part.excluded:
                what, where = self._buffers.slice_id(plan.epoch, part), slice(part.offset, part.offset + part.count)
                sources[where] = slice_sources(self.dataset.count, what)
                replaced = int(np.count_nonzero(sources[where] != ids[where]))
                self._substituted[plan.epoch] = self._substituted.get(plan.epoch, 0) + replaced
        return Batch(images, labels, ids, sources, draws, plan.epoch, plan.first)


def _close(session: Session, buffers: Buffers) -> None:
    session.close()
    buffers.close()
