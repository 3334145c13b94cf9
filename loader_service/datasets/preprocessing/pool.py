"""The worker pool: processes that convert items to records; it replaces dead workers and yields results in order.

Invariants:

- Work is assigned in chunks, one free area at a time, lowest chunk first. Results are yielded in order, and an area is free
  again after its result was consumed. So the number of workers bounds the memory, and the chunk that all others wait for
  is always in progress.
- The chunks of a dead worker are done again. The item that it was processing becomes a suspect: one death may have another
  cause (the machine was out of memory); after the second death the item is refused by name.
- Leaving the block kills the workers. They hold no state that could be lost.
"""

from __future__ import annotations

import heapq
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from types import TracebackType
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service.data.codecs import Codec, raw_bytes
from loader_service.datasets.preprocessing import messages
from loader_service.datasets.preprocessing.sources import Item
from loader_service.errors import PreprocessingFailed
from loader_service.types import RECORD_SIDE_PX

DEATHS: Final = 2
"""Number of workers that must die at an item before it is refused."""

# A packet of SOCK_SEQPACKET is sent whole or not at all.
SEND_BUFFER_BYTES: Final = 2**20
"""Socket send buffer: a job with 32 long paths must fit into one packet."""


class Result(msgspec.Struct, frozen=True):
    """The result of one chunk.

    Fields:
        items: the chunk's items.
        records: for each item, its stored record as a view of the worker's memory, or the reason why there is none. Views are
            valid until the next result is requested.
        count: number of items with a record.
        image: (side, side, 3) uint16, sum of the records' pixels; a view like the records.
        products: (3, 3) int64, sum of their colour products.
    """

    items: Sequence[Item]
    records: list[memoryview | str]
    count: int
    image: npt.NDArray[np.uint16]
    products: npt.NDArray[np.int64]


class _Worker:
    """A worker process with its socket, its shared memory and its jobs. The memory outlives the process."""

    def __init__(self, setup: messages.Setup) -> None:
        self._setup = setup
        self._file = os.memfd_create("chunks")  # no name in /dev/shm that a crash could leave behind
        os.ftruncate(self._file, setup.memory_bytes)
        self.memory = mmap.mmap(self._file, setup.memory_bytes)  # shared: a worker maps the same pages
        self.free = list(range(messages.AREAS))
        self.jobs: dict[int, messages.Job] = {}
        self.connection: socket.socket
        self.process: subprocess.Popen[bytes] | None = None  # end() must also work if start() fails

    def start(self) -> None:
        """Start the process, or its replacement."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # answers are short
        self._at()[0] = 0  # a dead predecessor left its item's number here
        self.connection = ours
        # Close the worker's end here: the pool sees an end of file only if no process holds that end.
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "loader_service.datasets.preprocessing.worker",
                    str(theirs.fileno()),
                    str(self._file),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._file),  # the child keeps the numbers, which are its arguments
                # One process per CPU: threads of NumPy's libraries would only compete with the other workers.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C then reaches the pool only, which stops the workers in order
            )
        self.send(self._setup)

    @property
    def at(self) -> int | None:
        """Index of the item that it is processing, within its first job; None if it is idle."""
        at = int(self._at()[0])
        return at - 1 if at else None

    def _at(self) -> npt.NDArray[np.int64]:
        return np.frombuffer(self.memory, np.int64, 1, self._setup.at_offset)

    def send(self, message: messages.ToWorker) -> None:
        """Send a message; if the worker has just died, do nothing: the pool will see the end of file."""
        try:
            self.connection.sendall(messages.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            return

    def end(self) -> int:
        """Kill the process, wait for it, and return its exit code."""
        if self.process is None:
            return 0
        self.connection.close()  # idempotent, as is the rest: the process may be dead already
        self.process.kill()
        return self.process.wait()  # and reap it

    def close(self) -> None:
        """End the process; its memory is freed when the last view of it is gone."""
        self.end()
        os.close(self._file)


class Pool:
    """A pool of worker processes, which start when the block is entered.

    Args:
        workers: number of processes.
        codec: codec of the records.
        parameters: parameters of the codec.
        limit_s: seconds that one image may take.
        side: side of the records, in pixels.
    """

    def __init__(
        self,
        workers: int,
        codec: Codec,
        parameters: dict[str, int | str],
        limit_s: float,
        side: int = RECORD_SIDE_PX,
    ) -> None:
        self._count, self._setup = workers, messages.Setup(codec, parameters, limit_s, side)
        self._workers: list[_Worker] = []
        self._exit = ExitStack()

    def __enter__(self) -> Pool:
        with ExitStack() as stack:  # closes the started workers if a later one cannot start
            self._selector = stack.enter_context(selectors.DefaultSelector())
            for _ in range(self._count):
                worker = _Worker(self._setup)
                stack.enter_context(closing(worker))
                worker.start()
                self._selector.register(worker.connection, selectors.EVENT_READ, worker)
                self._workers.append(worker)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._exit.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the current workers."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def run(self, items: Sequence[Item]) -> Iterator[Result]:
        """Yield the results of all items, chunk by chunk, in the items' order.

        Raises:
            PreprocessingFailed: workers die before they have started a job, or a URL cannot be read now.
        """
        run = _Run(self._workers, self._selector, items)
        # The lowest unfinished chunk is always with a worker, so the inner loop ends.
        for number in range(len(run.chunks)):
            run.assign()
            while number not in run.done:
                run.wait()
            worker, done, job = run.done.pop(number)
            yield _result(worker, self._setup, done, job)
            worker.free.append(job.area)  # only now: the consumer has finished with the views


class _Run:
    """The state of one call of :meth:`Pool.run`."""

    def __init__(self, workers: Sequence[_Worker], selector: selectors.BaseSelector, items: Sequence[Item]) -> None:
        self._workers, self._selector = workers, selector
        self.chunks = [items[i : i + messages.CHUNK_ITEMS] for i in range(0, len(items), messages.CHUNK_ITEMS)]
        self.waiting = list(range(len(self.chunks)))  # sorted, so it is a heap
        self.done: dict[int, tuple[_Worker, messages.Done, messages.Job]] = {}
        self.refused: dict[int, dict[int, str]] = {}  # reasons by chunk, then by item
        self.deaths: Counter[tuple[int, int]] = Counter()  # by chunk and item
        self.deaths_at_start = 0

    def assign(self) -> None:
        """Assign waiting chunks to free areas: first one to every worker, then a second one."""
        for worker in sorted(self._workers, key=lambda worker: len(worker.jobs)):
            self._give(worker)
        for worker in self._workers:
            self._give(worker)

    def _give(self, worker: _Worker) -> None:
        if self.waiting and worker.free:  # no free area: the consumer is behind, and memory is bounded
            number = heapq.heappop(self.waiting)
            job = messages.Job(number, worker.free.pop(), list(self.chunks[number]), self.refused.get(number, {}))
            worker.jobs[number] = job
            worker.send(job)

    def wait(self) -> None:
        """Wait for messages and deaths of workers, and handle them."""
        for key, _ in self._selector.select():
            worker: _Worker = key.data
            try:
                message = worker.connection.recv(messages.MESSAGE_BYTES)
            except ConnectionResetError:
                continue  # it died with an unread job; its earlier messages come first, then the end of file
            if message:
                self._note(worker, messages.decode_from_worker(message))
            else:
                self._replace(worker)

    def _note(self, worker: _Worker, message: messages.FromWorker) -> None:
        if isinstance(message, messages.Failed):
            raise PreprocessingFailed(message.sentence)
        self.deaths_at_start = 0  # a worker has done a job, so earlier deaths at the start were accidents
        self.done[message.number] = (worker, message, worker.jobs.pop(message.number))
        self._give(worker)

    def _replace(self, worker: _Worker) -> None:
        """Note the cause of a death, restart the process, and put its jobs back into the queue."""
        at, number = worker.at, next(iter(worker.jobs), None)  # a worker does its jobs in the order of the dict
        self._selector.unregister(worker.connection)  # before end(): a closed socket has no descriptor to unregister
        code = worker.end()
        if at is None or number is None:  # it died before its first item, for example at an import
            self.deaths_at_start += 1
            if self.deaths_at_start > DEATHS * len(self._workers):
                raise PreprocessingFailed(
                    f"worker processes end before they start to work (exit code {code}): see their errors above."
                )
        else:
            self.deaths[number, at] += 1
            if self.deaths[number, at] >= DEATHS:
                self.refused.setdefault(number, {})[at] = _cause(code)
        # Also jobs that it had not started: their results would never come.
        for job in worker.jobs.values():
            heapq.heappush(self.waiting, job.number)
            worker.free.append(job.area)
        worker.jobs.clear()
        worker.start()
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        self.assign()  # its jobs may go to any worker with a free area


def _result(worker: _Worker, setup: messages.Setup, done: messages.Done, job: messages.Job) -> Result:
    """Return the result of a chunk, as views of its worker's memory."""
    start, side = job.area * setup.area_bytes, setup.side
    view = memoryview(worker.memory)  # keeps the map alive: mmap refuses to close while views of it exist
    records = [
        outcome if isinstance(outcome, str) else view[start + outcome[0] : start + outcome[0] + outcome[1]]
        for outcome in done.outcomes
    ]
    image = np.frombuffer(worker.memory, np.uint16, raw_bytes(side), start + setup.sum_offset).reshape(side, side, 3)
    count = sum(not isinstance(record, str) for record in records)
    return Result(job.items, records, count, image, np.array(done.products, np.int64).reshape(3, 3))


def _cause(code: int) -> str:
    """Return the reason for refusing an item, from the exit code of the worker that it killed."""
    if code == -signal.SIGALRM:  # the worker's own time limit
        return "it took too long to decode"
    if code < 0:
        return f"it killed the process that decoded it ({signal.Signals(-code).name})"
    return f"it killed the process that decoded it (exit code {code})"
