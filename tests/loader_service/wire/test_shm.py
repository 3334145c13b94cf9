"""Segments: who may write when, and what is left behind when somebody dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loader_service.errors import SharedMemoryError
from loader_service.wire.shm import DIRECTORY, Claim, Hold, Segment, sweep

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
    """What one mapping writes, the other reads; the nonce proves that it is the same memory."""
    other = Segment.attach(segment.name)
    other.array(other.data_offset, (4,), np.int64)[:] = [1, 2, 3, 4]
    assert segment.array(segment.data_offset, (4,), np.int64).tolist() == [1, 2, 3, 4]
    assert other.nonce == segment.nonce
    assert (other.parts, other.data_offset, other.size) == (segment.parts, segment.data_offset, segment.size)
    other.close()


def test_arrays_stay_inside_of_the_data(segment: Segment) -> None:
    """Neither the header nor the generations nor what lies beyond the end can be had as an array."""
    for offset, count in ((0, 8), (segment.data_offset - 8, 1), (segment.size, 1), (segment.data_offset, 1 << 30)):
        with pytest.raises(SharedMemoryError, match="outside of the segment's data"):
            segment.array(offset, (count,), np.int64)


def test_only_the_current_generation_may_write(segment: Segment) -> None:
    """A lease of an earlier generation is told that it was given up; other parts are not concerned."""
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
    """While a writer holds a part its owner cannot begin a new generation, and another writer is told to wait."""
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
    """Under SIGSTOP the lock holds, so the slot is not given to others; SIGKILL frees it."""
    generation = segment.arm(0)
    writer = _process(WRITER, segment.name, str(generation))
    assert _line(writer) == "ours"
    writer.send_signal(signal.SIGSTOP)
    os.waitpid(writer.pid, os.WUNTRACED)
    assert segment.arm(0) is None
    _end(writer)
    assert segment.arm(0) == generation + 1


def test_a_writer_that_wakes_late_is_refused(segment: Segment) -> None:
    """A lease that reaches its worker only after the client gave it up writes nothing."""
    old = segment.arm(0)
    segment.arm(0)
    late = _process(WRITER, segment.name, str(old))
    assert _line(late) == "given up"
    _end(late)


def test_sweep_removes_orphans_and_nothing_else(segment: Segment) -> None:
    """The segment of a killed process goes, those of living ones stay, and so do others' files."""
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
    """A client cannot make a node open another file, a path, or something that is no segment."""
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
    """No room is an error with need, have and remedy at once, not a bus error later."""
    before = set(DIRECTORY.iterdir())
    with pytest.raises(SharedMemoryError, match=r"need \d+ MiB, have \d+ MiB.*--shm-size") as caught:
        Segment.create(1 << 50, 1)
    assert caught.value.need_bytes is not None
    assert caught.value.need_bytes >= 1 << 50
    assert set(DIRECTORY.iterdir()) <= before


def test_a_hold_lasts_until_the_last_view_is_gone(segment: Segment) -> None:
    """Slices and reshapes of an array keep its slot; only then is it released, once."""
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
    """A batch that the caller keeps stays readable after the loader was closed."""
    segment = Segment.create(4096, 1)
    array = segment.array(segment.data_offset, (16,), np.uint8)
    array[:] = 7
    segment.unlink()
    segment.close()
    assert array.tolist() == [7] * 16
