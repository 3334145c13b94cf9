"""The notebook, executed with interrupts in the middle of an epoch and a kernel that is killed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tools.examples.environment import ROOT


def epochs_of(text: str) -> dict[int, list[int]]:
    """Return the ids that were printed, by epoch, in order."""
    found: dict[int, list[int]] = {}
    for epoch, numbers in re.findall(r"epoch (\d+) loss \S+ ids \[([\d, ]*)\]", text):
        found.setdefault(int(epoch), []).extend(int(number) for number in numbers.split(","))
    return found


@pytest.mark.timeout(200)
def test_a_notebook_is_interrupted_and_killed(
    frameworks: Path, photographs: str, order: list[list[int]], tmp_path: Path
) -> None:
    """An interrupted epoch can be continued without a gap, a cell that is run again is the next epoch, and a killed kernel resumes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOADER_ADDRESS": photographs, "CHECKPOINT": str(tmp_path / "saved"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [str(frameworks), str(Path(__file__).with_name("notebook.py")), str(ROOT / "examples" / "notebook.ipynb")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    interrupted, continued, second, again, killed, resumed = re.split(r"^-- .*$", done.stdout, flags=re.MULTILINE)
    assert "KeyboardInterrupt" in interrupted
    assert "KeyboardInterrupt" in second
    assert "DeadKernelError" in killed
    # The batch in whose step the interrupt came was given, perhaps before its line was printed.
    printed = epochs_of(interrupted)[0] + epochs_of(continued)[0]
    assert order[0][: len(epochs_of(interrupted)[0])] == epochs_of(interrupted)[0]
    assert printed[-16:] == order[0][-16:]
    assert len(order[0]) - len(printed) in (0, 16)
    assert list(epochs_of(second)) == [1]
    assert epochs_of(again) == {2: order[2]}
    assert "epoch 0: 640 of 640 delivered, 0 left out" in again
    delivered, left_out = map(int, re.findall(r"epoch 1: (\d+) of 640 delivered, (\d+) left out", again)[0])
    assert delivered + left_out == 640
    assert left_out > 0
    rest = epochs_of(resumed)[3]
    assert 0 < len(order[3]) - len(rest) <= len(epochs_of(killed)[3])
    assert rest == order[3][-len(rest) :]
    assert [re.findall(r"accuracy \d+/(\d+)", part) for part in (continued, again, resumed)] == [["160"]] * 3
