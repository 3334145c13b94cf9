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

**Orphans.** The owner of a named segment holds a lock on byte 0 as long as it lives. A segment without this lock has lost
its owner, and :func:`sweep` removes it. The lock has an opening of its own, which is never mapped: a mapping keeps its opening
alive, also in a forked child. The child closes its copy of that opening, so the lock ends with the owner, and the child never
removes what is its parent's.

**Foreign files.** /dev/shm is open to every user, and a segment stays in its owner's hands: it can be a FIFO, claim any size,
or shrink at any moment. So a segment is opened without following links or waiting, it must be a regular file of this
process's user whose memory is allocated, and its header is read once, not from the map. Root is no exception to the
comparison of users: for root it is the only one, since file permissions do not stop it. A dispatcher maps no segment of a
client (:class:`SegmentWatch`). A worker that touches memory behind a segment's new end dies by SIGBUS, and the dispatcher sees
by :meth:`SegmentWatch.flaw` that the segment is the cause.
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import logging
import math
import mmap
import os
import re
import secrets
import stat
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from loader_service.errors import SharedMemoryError

log = logging.getLogger("loader_service.shm")

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - POSIX shared memory; names are random
HEADER: Final = struct.Struct("<16s16sIIQ")
"""Magic, nonce, number of parts, 4 bytes of zeros, offset of the data."""

MAGIC: Final = b"loader-service 1"  # 16 bytes; the digit is the version of the layout
PAGE_BYTES: Final = 4096
GENERATION_BYTES: Final = 8

MAX_BYTES: Final = 2**40
"""Upper bound of a segment that a process opens; a larger one is no client's, whose slots take some hundred megabytes."""

_NAME: Final = re.compile(r"loader-service-[0-9a-f]{32}")
_FLOCK: Final = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_OWNER_LOCK_AT: Final = 0
# O_NOFOLLOW: no symbolic link leads a node to another file. O_NONBLOCK: the open of a FIFO does not wait for a peer.
_FOREIGN_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_BLOCK_BYTES: Final = 512  # of st_blocks, on every file system (stat(2))


class _Header(NamedTuple):
    """The checked facts of a segment's file; offset and size in bytes."""

    nonce: bytes
    parts: int
    data_offset: int
    size: int


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

    def __init__(self, descriptor: int, name: str, header: _Header, owner_lock: int = -1) -> None:
        self._descriptor, self._owner_lock, self._header, self.name = descriptor, owner_lock, header, name
        self.nonce, self.parts, self.data_offset, self.size = header
        self._map = mmap.mmap(descriptor, self.size)  # shared; mmap duplicates the descriptor and keeps the copy
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
            SharedMemoryError: there is not enough memory, or /dev/shm is missing or read-only.
        """
        header = _Header(secrets.token_bytes(16), parts, *_extent(data_bytes, parts))
        name = f"loader-service-{secrets.token_hex(16)}" if named else ""
        descriptors: list[int] = []
        try:
            descriptors.append(_open_new(named=named))
            _allocate(descriptors[0], header.size, reserve=reserve or named)
            if not named:
                # Another process of this user can open it in /proc; the kernel offers seals for memory without a name only.
                fcntl.fcntl(descriptors[0], fcntl.F_ADD_SEALS, _SEALS)
            # Before the name exists, so no other process sees half a header.
            os.pwrite(descriptors[0], HEADER.pack(MAGIC, header.nonce, parts, 0, header.data_offset), 0)
            if named:
                # An opening of its own for the owner's lock, see Orphans; held until close().
                descriptors.append(_open_again(descriptors[0]))
                _lock(descriptors[1], fcntl.F_WRLCK, _OWNER_LOCK_AT)
            segment = cls(descriptors[0], name, header, *descriptors[1:])
            if named:
                # The name comes last: a sweep in another process must never see a segment whose owner lock is free.
                # src_dir_fd has no effect on an absolute path, but makes Python call linkat(2), which follows the link.
                source = f"/proc/self/fd/{descriptors[0]}"
                os.link(source, DIRECTORY / name, src_dir_fd=descriptors[0], follow_symlinks=True)
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise _unavailable(error, header.size) from error
            raise
        if named:
            _owned.add(segment)
        return segment

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Open and map another process's segment.

        Raises:
            SharedMemoryError: this user has no segment of that name on this machine.
        """
        descriptor, header = _open_foreign(name)
        try:
            return cls(descriptor, name, header)
        except (OSError, ValueError) as error:  # ValueError: it has shrunk since the check
            os.close(descriptor)
            raise SharedMemoryError(f"the segment {name} cannot be mapped ({error})") from error

    def reopen(self) -> Segment:
        """Open an inherited segment anew, for a forked child: locks exclude openings from each other, not processes."""
        return Segment(_open_again(self._descriptor), self.name, self._header)

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
            SharedMemoryError: the segment has no such part, or its owner has shrunk it.
        """
        if not 0 <= part < self.parts:
            raise SharedMemoryError(f"the segment has no part {part}")
        # A write behind the file's end would end this process by SIGBUS. The owner can still shrink it after this check.
        if os.fstat(self._descriptor).st_size < self.size:
            raise SharedMemoryError(_shrunk(self.name))
        if not _lock(self._descriptor, fcntl.F_WRLCK, self._lock_at(part)):
            yield Claim.BUSY  # a writer of an earlier lease is stopped in the middle, or still writes
            return
        try:
            # The comparison comes after the lock: before it, the owner could arm the part in between.
            yield Claim.OURS if int(self._generations[part]) == generation else Claim.GIVEN_UP
        finally:
            # After an exception, too: the process lives on and would keep it.
            _lock(self._descriptor, fcntl.F_UNLCK, self._lock_at(part))

    def unlink(self) -> None:
        """Remove the segment's name; mappings stay valid. Only the owner can: in a forked child this does nothing."""
        if self._owner_lock >= 0:
            (DIRECTORY / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the segment. The mapping disappears with the last array over it."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self.disown()
        del self._generations, self._bytes  # they export the map's buffer, and an exporting map cannot be closed
        with suppress(BufferError):  # arrays over the data exist, and keep the mapping alive
            self._map.close()
        del self._map  # else it would outlive the arrays for as long as anything refers to the segment

    def disown(self) -> None:
        """Close this process's copy of the owner's lock, if it has one. The lock ends with the last copy."""
        if self._owner_lock >= 0:
            os.close(self._owner_lock)
            self._owner_lock = -1

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


class SegmentWatch:
    """A client's segment as its node's dispatcher sees it: opened and never mapped, so that no file can end the dispatcher.

    Args:
        name: name of the segment.
        nonce: the nonce that its header must have.
        data_bytes, parts: size of its data, and number of its parts, that it must have.

    Raises:
        SharedMemoryError: this user has no such segment on this machine, or its owner is gone.
    """

    def __init__(self, name: str, nonce: bytes, data_bytes: int, parts: int) -> None:
        self.name = name
        self._descriptor, header = _open_foreign(name)
        try:
            if not hmac.compare_digest(header.nonce, nonce):
                raise SharedMemoryError(f"the nonce of {name} is another")
            if header != (header.nonce, parts, *_extent(data_bytes, parts)):
                raise SharedMemoryError(f"{name} has another layout than its client states")
            if self.orphaned():
                raise SharedMemoryError(f"{name} has lost its owner")
        except BaseException:
            self.close()
            raise
        self._size, self.data_offset = header.size, header.data_offset

    def fileno(self) -> int:
        """Return the descriptor of the opening."""
        return self._descriptor

    def orphaned(self) -> bool:
        """Return whether the owner of the segment is gone."""
        return _free(self._descriptor, _OWNER_LOCK_AT)

    def flaw(self) -> str:
        """Return the reason why a write into the segment can end the writer by SIGBUS; empty if none can."""
        facts = os.fstat(self._descriptor)
        return _shrunk(self.name) if min(facts.st_size, facts.st_blocks * _BLOCK_BYTES) < self._size else ""

    def close(self) -> None:
        """Close the opening; while it exists, the segment's memory does, too."""
        os.close(self._descriptor)


def sweep() -> list[str]:
    """Remove the segments of this user whose owner is gone, and return their names.

    Other users may put files of any kind and name into the directory. This function leaves them alone, and raises no OSError.
    """
    try:
        names = [path.name for path in DIRECTORY.iterdir() if _NAME.fullmatch(path.name)]
    except OSError as error:  # there is no shared memory on this machine
        log.debug("%s cannot be listed: %s", DIRECTORY, error)
        return []
    removed = []
    for name in names:
        try:
            descriptor = os.open(DIRECTORY / name, _FOREIGN_FLAGS)
        except OSError:  # it belongs to another user, or is gone already
            continue
        try:
            facts = os.fstat(descriptor)
            # Root can open and remove files of other users, too; their own processes sweep them.
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
                continue
            if _free(descriptor, _OWNER_LOCK_AT):
                (DIRECTORY / name).unlink(missing_ok=True)  # names are never reused: this is the file that was checked
                removed.append(name)
        except OSError as error:  # a read-only mount, for example
            log.debug("the segment %s stays: %s", name, error)
        finally:
            os.close(descriptor)
    return removed


_owned: Final[weakref.WeakSet[Segment]] = weakref.WeakSet()
"""The named segments that this process has created."""


def _disown_inherited() -> None:
    """In a forked child: leave the segments to the parent. Their mappings stay, since arrays over them may be in use."""
    for segment in list(_owned):
        segment.disown()
    _owned.clear()


os.register_at_fork(after_in_child=_disown_inherited)


def _open_foreign(name: str) -> tuple[int, _Header]:
    """Open a segment that another process made; return the descriptor and what is in the header.

    Raises:
        SharedMemoryError: there is none of that name, or it cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise SharedMemoryError(f"{name!r} is not a segment's name")
    try:
        descriptor = os.open(DIRECTORY / name, _FOREIGN_FLAGS)
    except OSError as error:
        raise SharedMemoryError(f"the segment {name} cannot be opened here ({error.strerror})") from error
    try:
        return descriptor, _read_header(descriptor, name)
    except BaseException:
        os.close(descriptor)
        raise


def _read_header(descriptor: int, name: str) -> _Header:
    """Check a segment's file and return the facts in its header; raise SharedMemoryError if it cannot be used."""
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise SharedMemoryError(f"{name} is not a regular file")
    if facts.st_uid != os.geteuid():
        raise SharedMemoryError(f"{name} belongs to another user")
    if facts.st_size > MAX_BYTES:
        raise SharedMemoryError(f"{name} is larger than {MAX_BYTES} bytes")
    if facts.st_blocks * _BLOCK_BYTES < facts.st_size:  # a write to a hole in a full /dev/shm ends in SIGBUS
        raise SharedMemoryError(f"the memory of {name} is not allocated")
    try:
        header = os.pread(descriptor, HEADER.size, 0)
    except OSError as error:
        raise SharedMemoryError(f"{name} cannot be read ({error.strerror})") from error
    if len(header) < HEADER.size:
        raise SharedMemoryError(f"{name} is too short for a segment")
    # The file belongs to a client, so its numbers are checked like those of a message.
    magic, nonce, parts, _, data_offset = HEADER.unpack(header)
    if magic != MAGIC or not PAGE_BYTES + parts * GENERATION_BYTES <= data_offset <= facts.st_size:
        raise SharedMemoryError(f"{name} is not a segment of this version")
    return _Header(nonce, parts, data_offset, facts.st_size)


def _open_new(*, named: bool) -> int:
    """Return the descriptor of a new, empty file without a name."""
    # 0600: only processes of this user can open the segment, so a node of another user sends frames.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE  # O_TMPFILE: no name yet, see create
    return (
        os.open(DIRECTORY, flags, 0o600)
        if named
        else os.memfd_create("loader-service", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    )


def _open_again(descriptor: int) -> int:
    """Open a file once more: locks exclude openings from each other, and a duplicate would share this one's."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def _allocate(descriptor: int, size: int, *, reserve: bool) -> None:
    """Give an empty file ``size`` bytes of zeroed memory, all of it allocated if ``reserve``."""
    if reserve:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)  # tmpfs allocates a page at the first write to it


def _unavailable(error: OSError, size: int) -> SharedMemoryError:
    """Return the error that says why a segment of ``size`` bytes cannot be created, and what to do."""
    # The file system is full, memory is exhausted, or the size is beyond that of the largest file.
    if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
        return SharedMemoryError(
            "there is not enough shared memory for the slots",
            size,
            _room(),
            "enlarge /dev/shm (docker: --shm-size), or use a smaller batch_size or prefetch",
        )
    return SharedMemoryError(
        f"shared memory cannot be created in {DIRECTORY} ({error.strerror})",
        remedy='mount a writable tmpfs there (docker: --shm-size), or use transport="tcp"',
    )


def _room() -> int | None:
    """Return the bytes that are free in /dev/shm; None if that is unknown."""
    try:
        room = os.statvfs(DIRECTORY)
    except OSError:  # it is missing, and the memory has no name
        return None
    return room.f_bavail * room.f_frsize


def _extent(data_bytes: int, parts: int) -> tuple[int, int]:
    """Return the offset of a segment's data and the segment's size, in bytes."""
    data_offset = _round_up(PAGE_BYTES + parts * GENERATION_BYTES)
    return data_offset, data_offset + _round_up(data_bytes)


def _shrunk(name: str) -> str:
    return f"the client's shared memory {name} has been truncated or has lost pages"


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
