"""A loader's shared memory: without it, beside forked children, and after a kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

WITHOUT = """
import logging, sys
from loader_service import Loader, errors
logging.basicConfig(level=logging.WARNING)
with Loader(sys.argv[1], batch_size=64, timeout_s=20) as loader:
    print("samples", sum(len(batch.labels) for batch in loader))
try:
    Loader(sys.argv[1], transport="shm", timeout_s=20)
except errors.SharedMemoryError as error:
    print("error", error.exit_code, error)
"""

AFTER_A_KILL = """
import os, signal, sys
from loader_service import Loader
from loader_service.wire.shm import DIRECTORY, Segment
owner = os.fork()
if owner == 0:
    Segment.create(4096, 1)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(owner, 0)
(orphan,) = DIRECTORY.iterdir()
with Loader(sys.argv[1], timeout_s=20):
    print(orphan.exists(), len(list(DIRECTORY.iterdir())))
"""

FORKING = """
import os, sys
from loader_service import Loader, status
from loader_service.wire.shm import DIRECTORY
loader = Loader(sys.argv[1], transport="shm", batch_size=32, epochs=2, timeout_s=20)
batch = next(loader.all_epochs())
child = os.fork()
if child == 0:
    if sys.argv[2] == "close":
        loader.close()
    del batch
    sys.exit(7)  # runs finalisers and exit handlers
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert len(list(DIRECTORY.glob(loader._buffers.segment.name))) == 1
print("samples", 32 + sum(len(batch.labels) for batch in loader.all_epochs()))
print([c.transport for c in status(sys.argv[1]).clients if c.name.endswith(f":{os.getpid()}")])
"""


@pytest.mark.parametrize("mount", ["mount -t tmpfs -o ro tmpfs /dev/shm", "mount -t tmpfs tmpfs /dev"])
def test_a_loader_without_shared_memory_uses_frames(
    run_with_own_shm: Callable[..., str], node_address: str, mount: str
) -> None:
    """With a read-only or missing /dev/shm, ``auto`` warns once with the remedy and uses frames; ``shm`` is an error."""
    said = run_with_own_shm(WITHOUT, node_address, mount=mount)
    assert "samples 300" in said
    assert said.count("WARNING") == 1
    assert (
        'mount a writable tmpfs there (docker: --shm-size), or use transport="tcp". Slices will come in frames' in said
    )
    assert "error 5 shared memory cannot be created in /dev/shm (" in said


def test_the_next_loader_removes_the_segment_of_a_killed_one(
    run_with_own_shm: Callable[..., str], node_address: str
) -> None:
    """A segment whose owner was killed, and which no node knows, goes when another loader starts."""
    assert run_with_own_shm(AFTER_A_KILL, node_address).splitlines()[0] == "False 1"


@pytest.mark.parametrize("end", ["exit", "close"])
def test_a_forked_child_that_ends_leaves_its_parents_loader_alone(node_address: str, end: str) -> None:
    """The parent's segment, connection and batches stay, also if the child closes the loader it inherited."""
    made = subprocess.run(
        [sys.executable, "-c", FORKING, node_address, end], capture_output=True, text=True, timeout=60, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == "samples 600\n['shm']\n"
