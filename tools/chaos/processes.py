"""Processes and their shared memory as the kernel reports them, to see what a run leaves behind."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loader_service.wire.shm import DIRECTORY, PAGE_BYTES

_CLONE_NEWNS: Final = 0x0002_0000  # from <sched.h>
_MS_REC: Final = 0x4000  # from <sys/mount.h>
_MS_PRIVATE: Final = 0x4_0000


@dataclass(frozen=True)
class Process:
    """A process: its id, its parent's, its session's, and its state as one letter (R, S, T for stopped, Z, ...)."""

    pid: int
    parent: int
    session: int
    state: str


def in_session(session: int) -> list[Process]:
    """Return the living processes of a session, without zombies."""
    found = []
    # A session's id is not reused while a member lives, so its orphans are found after the leader has ended.
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended after the listing
            process = _parse(path.read_text())
            if process.session == session and process.state not in "ZX":  # zombie, or dead: it runs no more code
                found.append(process)
    return found


def state(pid: int) -> str:
    """Return the state of a process as one letter, or nothing if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        found = _parse(Path(f"/proc/{pid}/stat").read_text()).state
        return "" if found in "ZX" else found
    return ""


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process, 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES  # proc(5): size resident shared ...
    return 0


def send(pids: Iterable[int], number: signal.Signals) -> bool:
    """Signal processes; return whether any of them existed."""
    reached = False
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, number)
            reached = True
    return reached


def segments_of(pid: int) -> set[Path]:
    """Return the segments in /dev/shm that a process has open.

    They are matched by inode: a segment gets its name after it was opened, so the link in /proc does not show it.
    """
    opened = set()
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since the listing
                opened.add(descriptor.stat().st_ino)  # follows the link to the open file itself, whatever its name
    found = set()
    for path in DIRECTORY.glob("loader-service-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_ino in opened:
                found.add(path)
    return found


def own_shared_memory() -> bool:
    """Give this process and its children a /dev/shm of their own, which shows what they do there and nobody else.

    Call it in the main thread, before there are others.

    Returns:
        False if the kernel does not permit it: it needs root.
    """
    libc = ctypes.CDLL(None)
    return bool(
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0  # else the next mount is everybody's
        and libc.mount(b"tmpfs", os.fsencode(DIRECTORY), b"tmpfs", 0, b"mode=1777") == 0
    )


def _parse(stat: str) -> Process:
    pid, _, rest = stat.partition(" (")  # proc(5): pid (name) state parent group session ...
    state, parent, _, session, *_ = rest.rpartition(") ")[2].split()  # the name in brackets may hold anything
    return Process(int(pid), int(parent), int(session), state)
