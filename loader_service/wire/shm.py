"""Shared-memory segments: who may write a part, and when a slot can be reused.

A **segment** is a file in /dev/shm with a random name, or a memfd without one. Its owner (a client, or a node for its send
slots) creates it; writers (workers) open it. The data is guarded in **parts**, one per slice of a slot. Layout, integers
little-endian::

    0                 HEADER: magic, nonce, number of parts, offset of the data
    PAGE_BYTES        one u64 per part: its generation
    data_offset       the data, from a page boundary to the end

**The problem.** A writer can be late: its process was stopped (SIGSTOP, a debugger), it is the orphan of a killed node, or
its lease lay in a queue. By then the owner has given the slice up and has assigned the memory to another one. A late write
would put the old slice into the new batch. A pid does not identify the writer, since each container has its own pid namespace.

**The solution**, for each part, is a generation number and a lock:

1. The owner *arms* a part (:meth:`Segment.arm`): it takes the part's lock, increments the generation, and releases the
   lock. The lease that it then sends names the new generation.
2. A writer *claims* the part (:meth:`Segment.writing`): it takes the lock, compares the generation with its lease's, and
   writes only if they are equal. It keeps the lock while it writes.
3. A late writer that claims the part finds another generation and writes nothing (``Claim.GIVEN_UP``).
4. A late writer that was stopped while writing still holds the lock. Then ``arm`` fails, and the owner must not use the
   part: it moves the batch to another slot and tries again later.

So after a successful ``arm``, no earlier lease can write into the part.

**The locks** are open-file-description locks (F_OFD_SETLK in fcntl(2)) on the first byte of the generation. Such a lock
belongs to one opening of the file. A stopped process keeps it; the kernel releases it when the last descriptor of that
opening closes, and so within a millisecond of SIGKILL. It works between containers that share /dev/shm. Two users that
share one opening would not exclude each other, so each user opens the segment for itself.

**Orphans.** The owner holds a lock on byte 0 of the segment as long as it lives. A segment without this lock has lost its
owner, and :func:`sweep` removes it.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loader_service.errors import SharedMemoryError

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - POSIX shared memory; names are random
HEADER: Final = struct.Struct("<16s16sIIQ")
"""Magic, nonce, number of parts, 4 bytes of zeros, offset of the data."""

MAGIC: Final = b"loader-service 1"  # 16 bytes; the digit is the version of the layout
PAGE_BYTES: Final = 4096
GENERATION_BYTES: Final = 8

_NAME: Final = re.compile(r"loader-service-[0-9a-f]{32}")
_FLOCK: Final = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_OWNER_LOCK_AT: Final = 0


class Claim(StrEnum):
    """Results of a writer's claim to a part. Only OURS permits it to write."""

    OURS = "ours"
    """The writer holds the lock and the generation is its lease's."""
    BUSY = "busy"
    """Another writer holds the lock."""
    GIVEN_UP = "given up"
    """The owner has armed the part again since, so the lease is void."""


class Segment:
    """A mapped segment. The owner makes it with :meth:`create`, writers open it with :meth:`attach`.

    Threads may read and write the data at the same time; everything else is for one thread only.
    """

    def __init__(self, descriptor: int, name: str, size: int) -> None:
        self._descriptor, self.name, self.size = descriptor, name, size
        self._map = mmap.mmap(descriptor, size)  # shared; mmap duplicates the descriptor and keeps the copy
        header: tuple[bytes, bytes, int, int, int] = HEADER.unpack_from(self._map)
        _, self.nonce, self.parts, _, self.data_offset = header
        # (parts,) u64 in the shared pages. Only the owner writes them, and only with the part's lock.
        self._generations = np.frombuffer(self._map, "<u8", self.parts, PAGE_BYTES)
        # (size,): the base of every array, so each keeps the mapping alive.
        self._bytes = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, data_bytes: int, parts: int, *, named: bool = True, reserve: bool = True) -> Segment:
        """Create a segment.

        Args:
            data_bytes: size of the data, in bytes.
            parts: number of parts.
            named: create it in /dev/shm, for other processes to open by name; otherwise only this process and its
                children can use it.
            reserve: allocate all of its memory at once. A named segment always does: a later write into a full /dev/shm
                would end the process with SIGBUS.

        Raises:
            SharedMemoryError: there is not enough memory.
        """
        data_offset = _round_up(PAGE_BYTES + parts * GENERATION_BYTES)
        size = data_offset + _round_up(data_bytes)
        descriptor = _allocate(size, named=named, reserve=reserve or named)
        try:
            # Before the name exists, so no other process sees half a header.
            os.pwrite(descriptor, HEADER.pack(MAGIC, secrets.token_bytes(16), parts, 0, data_offset), 0)
            _lock(descriptor, fcntl.F_WRLCK, _OWNER_LOCK_AT)  # held until close() and the end of the map
            name = f"loader-service-{secrets.token_hex(16)}" if named else ""
            if named:
                # The name comes last: a sweep in another process must never see a segment whose owner lock is free.
                # src_dir_fd has no effect on an absolute path, but makes Python call linkat(2), which follows the link.
                os.link(f"/proc/self/fd/{descriptor}", DIRECTORY / name, src_dir_fd=descriptor, follow_symlinks=True)
            return cls(descriptor, name, size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Open another process's segment.

        Raises:
            SharedMemoryError: no segment has that name on this machine.
        """
        if not _NAME.fullmatch(name):
            raise SharedMemoryError(f"{name!r} is not a segment's name")
        try:
            # O_NOFOLLOW: a client must not make a node open another file through a symbolic link.
            descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryError(f"the segment {name} cannot be opened here ({error.strerror})") from error
        try:
            size = os.fstat(descriptor).st_size
            header = os.pread(descriptor, HEADER.size, 0)
            if len(header) < HEADER.size:
                raise SharedMemoryError(f"{name} is too short for a segment")
            # The file belongs to a client, so its numbers are checked like those of a message.
            magic, _, parts, _, data_offset = HEADER.unpack(header)
            if magic != MAGIC or not PAGE_BYTES + parts * GENERATION_BYTES <= data_offset <= size:
                raise SharedMemoryError(f"{name} is not a segment of this version")
            return cls(descriptor, name, size)
        except BaseException:
            os.close(descriptor)
            raise

    def reopen(self) -> Segment:
        """Open an inherited segment anew, for a forked child: locks exclude openings from each other, not processes."""
        return Segment(os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_CLOEXEC), self.name, self.size)

    def array(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array over the data.

        Args:
            offset: of its first byte, in bytes from the segment's start.
            shape: of the array.
            dtype: of the array.

        Raises:
            SharedMemoryError: the array would reach outside of the data.
        """
        kind = np.dtype(dtype)
        length = math.prod(shape) * kind.itemsize
        # Python's integers do not overflow, so a large offset cannot wrap around into the data.
        if not self.data_offset <= offset <= offset + length <= self.size:
            raise SharedMemoryError(f"{length} bytes at {offset} are outside of the segment's data")
        return np.ndarray(shape, kind, self._bytes, offset)

    def arm(self, part: int) -> int | None:
        """Begin a new generation of a part and return it; None if a late writer holds the part. For the owner."""
        # Never waits: the caller is an event loop, and a stopped writer may hold the lock for hours.
        if not _lock(self._descriptor, fcntl.F_WRLCK, self._lock_at(part)):
            return None
        self._generations[part] += 1  # plain load and store: writers read it only under the lock
        generation = int(self._generations[part])
        _lock(self._descriptor, fcntl.F_UNLCK, self._lock_at(part))
        return generation

    @contextmanager
    def writing(self, part: int, generation: int) -> Iterator[Claim]:
        """Claim a part and hold it for the length of the ``with`` block. For writers.

        Args:
            part: number of the part.
            generation: the one that the lease names.

        Yields:
            Whether the part may be written: only if ``Claim.OURS``.

        Raises:
            SharedMemoryError: the segment has no such part.
        """
        if not 0 <= part < self.parts:
            raise SharedMemoryError(f"the segment has no part {part}")
        if not _lock(self._descriptor, fcntl.F_WRLCK, self._lock_at(part)):
            yield Claim.BUSY  # a writer of an earlier lease is stopped in the middle, or still writes
            return
        try:
            # The comparison comes after the lock: before it, the owner could arm the part in between.
            yield Claim.OURS if int(self._generations[part]) == generation else Claim.GIVEN_UP
        finally:
            # After an exception, too: the process lives on and would keep it.
            _lock(self._descriptor, fcntl.F_UNLCK, self._lock_at(part))

    def orphaned(self) -> bool:
        """Return whether the owner of the segment is gone."""
        return _free(self._descriptor, _OWNER_LOCK_AT)  # in the owner it is always True: its own lock does not count

    def unlink(self) -> None:
        """Remove the segment's name; mappings stay valid."""
        if self.name:
            (DIRECTORY / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the segment. The mapping disappears with the last array over it."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        del self._generations, self._bytes  # they export the map's buffer, and an exporting map cannot be closed
        with suppress(BufferError):  # arrays over the data exist, and keep the mapping alive
            self._map.close()

    def _lock_at(self, part: int) -> int:
        return PAGE_BYTES + part * GENERATION_BYTES


class Hold:
    """A hold on a slot, which lasts until the last array over the slot is garbage-collected.

    ``np.asarray(hold)`` and every view of that array keep the hold alive. Its finaliser calls ``release``, in any thread
    and between any two instructions, so ``release`` may only append to a deque or wake a loop.
    """

    __slots__ = ("__array_interface__", "_array", "_release")

    def __init__(self, array: npt.NDArray[np.uint8], release: Callable[[], None]) -> None:
        self._array, self._release = array, release  # a reference to the array keeps the mapping alive
        # NumPy makes an object with this attribute the base of the array.
        self.__array_interface__ = array.__array_interface__

    def __del__(self) -> None:
        self._release()


def sweep() -> list[str]:
    """Remove the segments whose owner is gone, and return their names."""
    removed = []
    for path in DIRECTORY.glob("loader-service-*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # it belongs to another user, or is gone already
            continue
        try:
            if _free(descriptor, _OWNER_LOCK_AT):
                path.unlink(missing_ok=True)  # names are random and never reused: this is the file that was checked
                removed.append(path.name)
        finally:
            os.close(descriptor)
    return removed


def _allocate(size: int, *, named: bool, reserve: bool) -> int:
    """Return a descriptor of ``size`` bytes of zeroed memory, all of it allocated if ``reserve``."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE  # O_TMPFILE: no name yet, see create
    # 0600: only processes of this user can open the segment, so a node of another user sends frames.
    descriptor = os.open(DIRECTORY, flags, 0o600) if named else os.memfd_create("loader-service", os.MFD_CLOEXEC)
    try:
        if reserve:
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)  # tmpfs allocates a page at the first write to it
    except OSError as error:
        os.close(descriptor)
        # The file system is full, memory is exhausted, or the size is beyond that of the largest file.
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        room = os.statvfs(DIRECTORY)
        raise SharedMemoryError(
            "there is not enough shared memory for the slots",
            size,
            room.f_bavail * room.f_frsize,
            "enlarge /dev/shm (docker: --shm-size), or use a smaller batch_size or prefetch",
        ) from error
    return descriptor


def _lock(descriptor: int, kind: int, at: int) -> bool:
    """Take or release the lock on one byte, without waiting; return False if another opening holds it."""
    try:
        # The last field, pid, must be 0 for OFD locks (fcntl(2)).
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # fcntl(2) allows both for a conflict
            return False
        raise
    return True


def _free(descriptor: int, at: int) -> bool:
    """Return whether no other opening holds the lock on one byte."""
    # F_OFD_GETLK returns the lock that is in the way, or F_UNLCK if the asked one could be taken.
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)


def _round_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
