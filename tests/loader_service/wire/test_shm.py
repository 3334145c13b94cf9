"""Segments: the right to write a part, and the state after a process dies."""

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
