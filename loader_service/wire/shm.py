"""Shared-memory segments and the slots in them: who may write where, and when a slot comes back.

Rules of this file:

- A **segment** is a file in /dev/shm with an unguessable name (or a memfd without one). Its maker holds a lock on its
  first byte for as long as it lives; a segment whose lock is free is an orphan, and :func:`sweep` removes it.
- A segment's data is guarded in **parts**. Each part has a generation word, and the same bytes of the file serve as
  its lock. A writer (a node's worker) may write a part only inside :meth:`Segment.writing`: it locks, checks that the
  generation is the one its lease names, writes, unlocks. The owner (a client) changes a generation only by
  :meth:`Segment.arm`, which takes the same lock. So after ``arm`` no earlier lease can write the part any more, also
  not from a process that was stopped for minutes or lost its node; and where ``arm`` fails, a late writer is at work
  and the owner must not use the part.
- Locks are open-file-description locks: held under SIGSTOP, released by the kernel when the last descriptor is gone,
  as after SIGKILL, and valid between containers that share /dev/shm. Each user of a segment opens it by itself, for
  locks conflict between descriptions, not between processes.

Layout, little-endian: HEADER in the first page; then one u64 generation per part; then, from a page boundary, data.
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

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - POSIX shared memory lives here; names are random, files made with O_EXCL
HEADER: Final = struct.Struct("<16s16sIIQ")
"""magic, nonce, number of parts, 4 bytes of zeros, offset of the data."""
MAGIC: Final = b"loader-service 1"
PAGE_BYTES: Final = 4096
GENERATION_BYTES: Final = 8

_NAME: Final = re.compile(r"loader-service-[0-9a-f]{32}")
_FLOCK: Final = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_OWNER_LOCK_AT: Final = 0


class Claim(StrEnum):
    """Outcomes of a writer's attempt to take a part. Only OURS permits it to write."""

    OURS = "ours"
    BUSY = "busy"
    GIVEN_UP = "given up"


class Segment:
    """A mapped segment. Made by :meth:`create`, opened by others with :meth:`attach`.

    One owner, one mapping each; not safe to use from several threads at once, except for reading and writing data.
    """

    def __init__(self, descriptor: int, name: str, size: int) -> None:
        self._descriptor, self.name, self.size = descriptor, name, size
        self._map = mmap.mmap(descriptor, size)
        header: tuple[bytes, bytes, int, int, int] = HEADER.unpack_from(self._map)
        _, self.nonce, self.parts, _, self.data_offset = header
        self._generations = np.frombuffer(self._map, "<u8", self.parts, PAGE_BYTES)
        self._bytes = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, data_bytes: int, parts: int, *, named: bool = True, reserve: bool = True) -> Segment:
        """Make a segment.

        Args:
            data_bytes: size of the data area.
            parts: how many parts guard it.
            named: in /dev/shm, for others to open by name; otherwise private to this process and its children.
            reserve: allocate all its memory at once, so that no later write can fail. What has a name must: /dev/shm
                may be full by then, and a write to it a bus error.

        Raises:
            SharedMemoryError: there is not enough room.
        """
        data_offset = _round_up(PAGE_BYTES + parts * GENERATION_BYTES)
        size = data_offset + _round_up(data_bytes)
        descriptor = _allocate(size, named=named, reserve=reserve or named)
        try:
            os.pwrite(descriptor, HEADER.pack(MAGIC, secrets.token_bytes(16), parts, 0, data_offset), 0)
            _lock(descriptor, fcntl.F_WRLCK, _OWNER_LOCK_AT)
            name = f"loader-service-{secrets.token_hex(16)}" if named else ""
            if named:  # it appears under its name only now, whole and owned, so that no sweep can mistake it
                # A directory's descriptor, though the path is absolute, makes Python call linkat, which follows links.
                os.link(f"/proc/self/fd/{descriptor}", DIRECTORY / name, src_dir_fd=descriptor, follow_symlinks=True)
            return cls(descriptor, name, size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Open another process's segment.

        Raises:
            SharedMemoryError: there is none of that name here, or it is not a segment.
        """
        if not _NAME.fullmatch(name):
            raise SharedMemoryError(f"{name!r} is not a segment's name")
        try:
            descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryError(f"the segment {name} cannot be opened here ({error.strerror})") from error
        try:
            size = os.fstat(descriptor).st_size
            header = os.pread(descriptor, HEADER.size, 0)
            if len(header) < HEADER.size:
                raise SharedMemoryError(f"{name} is too short for a segment")
            magic, _, parts, _, data_offset = HEADER.unpack(header)
            if magic != MAGIC or not PAGE_BYTES + parts * GENERATION_BYTES <= data_offset <= size:
                raise SharedMemoryError(f"{name} is not a segment of this version")
            return cls(descriptor, name, size)
        except BaseException:
            os.close(descriptor)
            raise

    def reopen(self) -> Segment:
        """A forked child's own opening of a segment that it inherited: locks are between openings."""
        return Segment(os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_CLOEXEC), self.name, self.size)

    def array(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array over the data: ``offset`` counts bytes from the segment's start.

        Raises:
            SharedMemoryError: it would reach outside of the data area.
        """
        kind = np.dtype(dtype)
        length = math.prod(shape) * kind.itemsize
        if not self.data_offset <= offset <= offset + length <= self.size:
            raise SharedMemoryError(f"{length} bytes at {offset} are outside of the segment's data")
        return np.ndarray(shape, kind, self._bytes, offset)

    def arm(self, part: int) -> int | None:
        """Owner: begin a new generation of a part and return it; None if a late writer holds the part."""
        if not _lock(self._descriptor, fcntl.F_WRLCK, self._lock_at(part)):
            return None
        self._generations[part] += 1
        generation = int(self._generations[part])
        _lock(self._descriptor, fcntl.F_UNLCK, self._lock_at(part))
        return generation

    @contextmanager
    def writing(self, part: int, generation: int) -> Iterator[Claim]:
        """Writer: hold a part. It may be written only if this gives ``ours``.

        ``busy``: another holds the part at this moment. ``given up``: it has another generation, the lease is void.
        """
        if not 0 <= part < self.parts:
            raise SharedMemoryError(f"the segment has no part {part}")
        if not _lock(self._descriptor, fcntl.F_WRLCK, self._lock_at(part)):
            yield Claim.BUSY
            return
        try:
            yield Claim.OURS if int(self._generations[part]) == generation else Claim.GIVEN_UP
        finally:
            _lock(self._descriptor, fcntl.F_UNLCK, self._lock_at(part))

    def orphaned(self) -> bool:
        """Whether the segment's maker is gone."""
        return _free(self._descriptor, _OWNER_LOCK_AT)

    def unlink(self) -> None:
        """Take the segment's name away; mappings stay valid."""
        if self.name:
            (DIRECTORY / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the segment. The mapping itself goes when the last array over it does."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        del self._generations, self._bytes
        with suppress(BufferError):  # arrays over the data are still out there, and keep the mapping alive
            self._map.close()

    def _lock_at(self, part: int) -> int:
        return PAGE_BYTES + part * GENERATION_BYTES


class Hold:
    """Keeps a slot away from its owner until the last array over it is gone.

    ``np.asarray(hold)`` and every view of that array keep the hold alive; when it is collected, by whichever thread and
    at whatever moment, ``release`` is called. It must be safe to call from anywhere: append to a deque, wake a loop.
    """

    __slots__ = ("__array_interface__", "_array", "_release")

    def __init__(self, array: npt.NDArray[np.uint8], release: Callable[[], None]) -> None:
        self._array, self._release = array, release  # the array keeps the mapping alive
        self.__array_interface__ = array.__array_interface__

    def __del__(self) -> None:
        self._release()


def sweep() -> list[str]:
    """Remove the segments of makers that are gone, and return their names. Others' live segments stay."""
    removed = []
    for path in DIRECTORY.glob("loader-service-*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or gone since
            continue
        try:
            if _free(descriptor, _OWNER_LOCK_AT):
                path.unlink(missing_ok=True)
                removed.append(path.name)
        finally:
            os.close(descriptor)
    return removed


def _allocate(size: int, *, named: bool, reserve: bool) -> int:
    """A descriptor of ``size`` bytes of zeroed memory, all of it allocated if ``reserve``."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE
    descriptor = os.open(DIRECTORY, flags, 0o600) if named else os.memfd_create("loader-service", os.MFD_CLOEXEC)
    try:
        if reserve:
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        room = os.statvfs(DIRECTORY)
        raise SharedMemoryError(
            "there is not enough shared memory for the slots",
            size,
            room.f_bavail * room.f_frsize,
            "enlarge /dev/shm (docker: --shm-size), or ask for smaller batches or fewer slots (prefetch)",
        ) from error
    return descriptor


def _lock(descriptor: int, kind: int, at: int) -> bool:
    """Take or release the lock on one byte; False if another description holds it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _free(descriptor: int, at: int) -> bool:
    """Whether nobody holds the lock on one byte."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)


def _round_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
