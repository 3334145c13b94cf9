"""Segments: the right to write a part, and the state after a process dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loader_service.errors import SharedMemoryError
from loader_service.wire.shm import (
    DIRECTORY,
    HEADER,
    MAGIC,
    MAX_BYTES,
    PAGE_BYTES,
    Claim,
    Hold,
    Segment,
    SegmentWatch,
    sweep,
)

WRITER = """
import sys
from loader_service.wire.shm import Segment
segment = Segment.attach(sys.argv[1])
with segment.writing(0, int(sys.argv[2])) as state:
    print(state, flush=True)
    sys.stdin.readline()
"""
OWNER = """
import sys
from loader_service.wire.shm import Segment
segment = Segment.create(4096, 1)
print(segment.name, flush=True)
sys.stdin.readline()
"""


def _process(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(1 << 16, 4)
    yield made
    made.unlink()
    made.close()


def test_another_opening_sees_the_same_bytes_and_nonce(segment: Segment) -> None:
    """Two openings of a segment share its bytes and its nonce."""
    other = Segment.attach(segment.name)
    other.array(other.data_offset, (4,), np.int64)[:] = [1, 2, 3, 4]
    assert segment.array(segment.data_offset, (4,), np.int64).tolist() == [1, 2, 3, 4]
    assert other.nonce == segment.nonce
    assert (other.parts, other.data_offset, other.size) == (segment.parts, segment.data_offset, segment.size)
    other.close()


def test_arrays_stay_inside_of_the_data(segment: Segment) -> None:
    """An array over the header, the generations or beyond the end raises an error."""
    for offset, count in ((0, 8), (segment.data_offset - 8, 1), (segment.size, 1), (segment.data_offset, 1 << 30)):
        with pytest.raises(SharedMemoryError, match="outside of the segment's data"):
            segment.array(offset, (count,), np.int64)


def test_only_the_current_generation_may_write(segment: Segment) -> None:
    """A claim with an earlier generation returns GIVEN_UP; other parts keep their generation."""
    writer = Segment.attach(segment.name)
    first = segment.arm(1)
    assert first is not None
    with writer.writing(1, first) as state:
        assert state is Claim.OURS
    second = segment.arm(1)
    assert second == first + 1
    with writer.writing(1, first) as state:
        assert state is Claim.GIVEN_UP
    with writer.writing(1, second) as state:
        assert state is Claim.OURS
    assert segment.arm(2) == 1
    writer.close()


def test_a_part_being_written_cannot_be_armed(segment: Segment) -> None:
    """While a writer holds a part, its owner cannot arm it, and another writer's claim returns BUSY."""
    writer, late = Segment.attach(segment.name), Segment.attach(segment.name)
    generation = segment.arm(0)
    assert generation is not None
    with writer.writing(0, generation):
        assert segment.arm(0) is None
        with late.writing(0, generation) as state:
            assert state is Claim.BUSY
    assert segment.arm(0) == generation + 1
    writer.close()
    late.close()


def test_a_stopped_writer_keeps_its_part_and_a_killed_one_frees_it(segment: Segment) -> None:
    """A writer keeps its lock under SIGSTOP and loses it by SIGKILL."""
    generation = segment.arm(0)
    writer = _process(WRITER, segment.name, str(generation))
    assert _line(writer) == "ours"
    writer.send_signal(signal.SIGSTOP)
    os.waitpid(writer.pid, os.WUNTRACED)
    assert segment.arm(0) is None
    _end(writer)
    assert segment.arm(0) == generation + 1


def test_a_writer_that_wakes_late_is_refused(segment: Segment) -> None:
    """A lease that reaches its worker after the owner armed the part again writes nothing."""
    old = segment.arm(0)
    segment.arm(0)
    late = _process(WRITER, segment.name, str(old))
    assert _line(late) == "given up"
    _end(late)


def test_sweep_removes_orphans_and_nothing_else(segment: Segment) -> None:
    """A sweep removes the segment of a killed process and keeps those of living ones."""
    living, dead = _process(OWNER), _process(OWNER)
    living_name, dead_name = _line(living), _line(dead)
    _end(dead)
    removed = sweep()
    assert dead_name in removed
    assert not (DIRECTORY / dead_name).exists()
    assert (DIRECTORY / living_name).exists()
    assert (DIRECTORY / segment.name).exists()
    _end(living)
    assert living_name in sweep()


def test_a_name_that_is_not_a_segments_is_refused(tmp_path: Path) -> None:
    """A client cannot make a node open a path or a file that is not a segment."""
    for name in ("../etc/passwd", "loader-service-../../etc/passwd", "loader-service-" + "g" * 32, ""):
        with pytest.raises(SharedMemoryError, match="is not a segment's name"):
            Segment.attach(name)
    with pytest.raises(SharedMemoryError, match="cannot be opened here"):
        Segment.attach("loader-service-" + "0" * 32)
    foreign = DIRECTORY / ("loader-service-" + os.urandom(16).hex())
    try:
        foreign.write_bytes(b"x" * 8192)
        with pytest.raises(SharedMemoryError, match="is not a segment of this version"):
            Segment.attach(foreign.name)
        foreign.write_bytes(b"x")
        with pytest.raises(SharedMemoryError, match="too short"):
            Segment.attach(foreign.name)
    finally:
        foreign.unlink()


def test_too_large_a_segment_says_what_is_needed_and_leaves_nothing() -> None:
    """Too little memory raises an error with need, have and remedy at creation, not SIGBUS at the first write."""
    before = set(DIRECTORY.iterdir())
    with pytest.raises(SharedMemoryError, match=r"need \d+ MiB, have \d+ MiB.*--shm-size") as caught:
        Segment.create(1 << 50, 1)
    assert caught.value.need_bytes is not None
    assert caught.value.need_bytes >= 1 << 50
    assert set(DIRECTORY.iterdir()) <= before


def test_a_hold_lasts_until_the_last_view_is_gone(segment: Segment) -> None:
    """Views of an array keep its slot; the slot is released once, with the last of them."""
    released: list[int] = []
    hold = Hold(segment.array(segment.data_offset, (1024,), np.uint8), lambda: released.append(1))
    whole = np.asarray(hold)
    del hold
    view = whole[8:72].view(np.int64).reshape(2, 4)[1]
    del whole
    assert released == []
    del view
    assert released == [1]


def test_arrays_outlive_their_segment() -> None:
    """A batch that the caller keeps stays readable after the loader is closed."""
    segment = Segment.create(4096, 1)
    array = segment.array(segment.data_offset, (16,), np.uint8)
    array[:] = 7
    segment.unlink()
    segment.close()
    assert array.tolist() == [7] * 16


# Files that others put into /dev/shm

SOMEBODY = 12_345
"""A user id; as root, a test gives a file to it, or becomes it."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A path in /dev/shm with a segment's name, for a file of any kind."""
    path = DIRECTORY / f"loader-service-{os.urandom(16).hex()}"
    yield path
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _valid(path: Path, size: int = 2 * PAGE_BYTES) -> None:
    """Write a segment with the nonce ``n...``, one part and one page of data, but without an owner's lock."""
    path.write_bytes(HEADER.pack(MAGIC, b"n" * 16, 1, 0, 2 * PAGE_BYTES).ljust(size, b"\0"))


def _sparse(path: Path) -> None:
    _valid(path)
    os.truncate(path, MAX_BYTES)


def _huge(path: Path) -> None:
    _valid(path)
    os.truncate(path, 2**62)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _short(path: Path) -> None:
    _valid(path)
    os.truncate(path, PAGE_BYTES)  # the header's data begin beyond it


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _sparse, _huge, _link, _listen, _short, Path.touch])
def test_no_file_of_another_kind_stops_the_opener(make: Callable[[Path], None], foreign: Path) -> None:
    """A FIFO, a directory, a link, a socket, a sparse, huge, truncated or empty file is an error, without waiting."""
    make(foreign)
    with pytest.raises(SharedMemoryError):
        Segment.attach(foreign.name)
    with pytest.raises(SharedMemoryError):
        SegmentWatch(foreign.name, b"n" * 16, PAGE_BYTES, 1)
    sweep()  # raises nothing


@needs_root
def test_a_segment_of_another_user_is_not_opened_by_root_either(segment: Segment) -> None:
    """Root, whom file permissions do not stop, compares the owners."""
    os.chown(DIRECTORY / segment.name, SOMEBODY, SOMEBODY)
    with pytest.raises(SharedMemoryError, match="belongs to another user"):
        SegmentWatch(segment.name, segment.nonce, 1 << 16, 4)
    with pytest.raises(SharedMemoryError, match="belongs to another user"):
        Segment.attach(segment.name)


def test_only_who_knows_the_nonce_and_the_layout_may_have_a_segment_watched(segment: Segment) -> None:
    """A wrong nonce, another size or another number of parts is refused."""
    SegmentWatch(segment.name, segment.nonce, 1 << 16, 4).close()
    with pytest.raises(SharedMemoryError, match="nonce"):
        SegmentWatch(segment.name, bytes(16), 1 << 16, 4)
    for data_bytes, parts in ((1 << 20, 4), (1 << 15, 4), (1 << 16, 3)):
        with pytest.raises(SharedMemoryError, match="layout"):
            SegmentWatch(segment.name, segment.nonce, data_bytes, parts)


def test_a_segment_without_an_owner_is_not_watched(foreign: Path) -> None:
    """A segment whose owner's lock is free is refused."""
    _valid(foreign, 3 * PAGE_BYTES)
    with pytest.raises(SharedMemoryError, match="lost its owner"):
        SegmentWatch(foreign.name, b"n" * 16, PAGE_BYTES, 1)


@needs_root
def test_sweep_leaves_the_files_of_other_users_alone(foreign: Path) -> None:
    """Root keeps an empty file of another user; a third user, who may open the file but not remove it, survives it."""
    foreign.touch()
    foreign.chmod(0o666)
    os.chown(foreign, SOMEBODY, SOMEBODY)
    assert foreign.name not in sweep()
    assert foreign.exists()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setuid(SOMEBODY + 1)
            os.close(os.open(foreign, os.O_RDWR))
            code = 0 if sweep() == [] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert foreign.exists()


def test_a_segment_that_its_owner_shrinks_is_noticed(segment: Segment) -> None:
    """A watch reports a truncated segment and one with a hole; a writer does not write into a truncated one."""
    watch, writer = SegmentWatch(segment.name, segment.nonce, 1 << 16, 4), Segment.attach(segment.name)
    generation = segment.arm(3) or 0
    assert watch.flaw() == ""
    os.truncate(DIRECTORY / segment.name, PAGE_BYTES)
    assert segment.name in watch.flaw()
    with pytest.raises(SharedMemoryError, match=f"{segment.name} has been truncated"), writer.writing(3, generation):
        pytest.fail("the claim was granted")
    os.truncate(DIRECTORY / segment.name, segment.size)  # its pages are gone all the same
    assert segment.name in watch.flaw()
    writer.close()
    watch.close()


FORKING_OWNER = """
import os, sys
from loader_service.wire.shm import Segment
segment = Segment.create(1 << 16, 1)
child = os.fork()
if child == 0:
    segment.unlink()
    sys.stdin.readline()
    sys.exit()
print(segment.name, child, flush=True)
sys.stdin.readline()
"""


def test_a_forked_child_neither_removes_its_parents_segment_nor_outlives_its_lock() -> None:
    """A child that closes and unlinks changes nothing; when the owner is killed, a living child does not keep the name."""
    owner = _process(FORKING_OWNER)
    name, child = _line(owner).split()
    try:
        sweep()
        assert (DIRECTORY / name).exists()
        owner.kill()
        owner.wait()
        assert Path(f"/proc/{child}").exists()
        sweep()
        assert not (DIRECTORY / name).exists()
    finally:
        os.kill(int(child), signal.SIGKILL)
        _end(owner)


@pytest.mark.parametrize("mount", ["mount -t tmpfs -o ro tmpfs /dev/shm", "mount -t tmpfs tmpfs /dev"])
def test_a_read_only_or_missing_directory_is_a_named_error(run_with_own_shm: Callable[..., str], mount: str) -> None:
    """The error names the directory, the cause and the remedy; a sweep finds nothing, and memory without a name works."""
    script = """
from loader_service.errors import SharedMemoryError
from loader_service.wire.shm import Segment, sweep
assert sweep() == []
Segment.create(4096, 1, named=False)
try:
    Segment.create(4096, 1)
except SharedMemoryError as error:
    print(error)
"""
    said = run_with_own_shm(script, mount=mount)
    assert said.startswith("shared memory cannot be created in /dev/shm (")
    assert "mount a writable tmpfs there" in said


def test_memory_without_a_name_cannot_be_truncated() -> None:
    """Another process that opens a node's send slots through /proc cannot shrink them under its workers."""
    segment = Segment.create(4096, 1, named=False)
    mine = [
        path
        for path in Path("/proc/self/fd").iterdir()
        if path.is_symlink() and "memfd:loader-service" in str(path.readlink())
    ]
    assert mine
    for path in mine:
        with pytest.raises(PermissionError):
            os.truncate(path, 0)
    segment.close()


def test_the_memory_of_a_closed_segment_goes_with_its_last_array() -> None:
    """Arrays keep the mapping of a closed segment; without them it is gone, although the segment is still referred to."""

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(f" {inode} ")

    segment = Segment.create(1 << 20, 1, named=False)
    array = segment.array(segment.data_offset, (16,), np.uint8)
    inode = os.fstat(segment._descriptor).st_ino
    segment.close()
    array[:] = 7
    assert mappings() == 1
    del array
    assert mappings() == 0
