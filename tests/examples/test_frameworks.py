"""Every example with its real framework: killed in the middle of an epoch and resumed, it trains exactly the rest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.examples.conftest import EPOCHS
from tools.examples.environment import ROOT

TIMEOUT_S = 100
KILL_AT_STEP = 12
"""Steps of the second epoch after which a run is killed: the examples save after every fifth or sixth."""


class Run(NamedTuple):
    """Output of an example.

    Fields:
        ids: the records of each batch, by epoch, in order of printing.
        accuracies: the denominators of the accuracies.
        text: everything.
    """

    ids: dict[int, list[list[int]]]
    accuracies: list[int]
    text: str


def parse(text: str) -> Run:
    ids: dict[int, list[list[int]]] = {}
    # Ranks write to one pipe, and a line may follow another's without its end of line.
    for epoch, numbers in re.findall(r"epoch (\d+)[^\[\n]* ids \[([\d, ]*)\]", text):
        ids.setdefault(int(epoch), []).append([int(number) for number in numbers.split(",") if number.strip()])
    return Run(ids, [int(count) for count in re.findall(r"(?:accuracy \d+/|/1 after |eval_of': '?)(\d+)", text)], text)


def kill_all(pid: int) -> None:
    """Kill a process and those it started; torchrun gives each rank a session of its own."""
    family = psutil.Process(pid)
    for each in (family, *family.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def run(python: Path, address: str, folder: Path, command: list[str], kill: bool) -> Run:
    """Run an example to its end, or until SIGKILL in the middle of its second epoch."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    environment["PYTHONPATH"] = str(ROOT)
    command = [str(python), *command, f"--address={address}", f"--epochs={EPOCHS}", f"--checkpoint={folder / 'saved'}"]
    lines: list[str] = []
    steps = 0
    with (folder / "errors").open("w+") as errors, subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                steps += line.startswith("epoch 1 ") and " ids " in line
                if kill and steps == KILL_AT_STEP:
                    break
        except BaseException:  # a timeout, too: nothing may stay behind
            kill_all(process.pid)
            raise
        if kill:
            kill_all(process.pid)
        lines += process.stdout.readlines()
        code = process.wait(TIMEOUT_S)
        errors.seek(0)
        assert code == (-signal.SIGKILL if kill else 0), "".join(lines) + errors.read()
    return parse("".join(lines))


def torchrun(file: str, ranks: int) -> list[str]:
    options = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*options, str(ROOT / "examples" / file)]


def alone(file: str, ranks: int) -> list[str]:
    return [str(ROOT / "examples" / file), *([f"--devices={ranks}"] if ranks > 1 else [])]


CASES = [
    pytest.param(alone, "pytorch_loop.py", 1, 1, id="pytorch"),
    pytest.param(torchrun, "ddp.py", 2, 1, id="ddp-2-1"),
    pytest.param(torchrun, "ddp.py", 1, 2, id="ddp-1-2"),
    pytest.param(alone, "lightning_trainer.py", 2, 1, id="lightning-2-1"),
    pytest.param(alone, "lightning_trainer.py", 1, 2, id="lightning-1-2"),
    pytest.param(alone, "fabric_loop.py", 1, 2, id="fabric-1-2"),
    pytest.param(torchrun, "accelerate_loop.py", 2, 1, id="accelerate-2-1"),
    pytest.param(torchrun, "accelerate_loop.py", 1, 2, id="accelerate-1-2"),
    pytest.param(alone, "huggingface_trainer.py", 1, 1, id="huggingface"),
    pytest.param(alone, "ignite_engine.py", 1, 1, id="ignite"),
    pytest.param(alone, "jax_loop.py", 1, 1, id="jax"),
]


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize(("launch", "file", "before", "after"), CASES)
def test_a_killed_example_continues_with_exactly_the_rest(
    launch,
    file: str,
    before: int,
    after: int,
    frameworks: Path,
    photographs: str,
    order: list[list[int]],
    tmp_path: Path,
) -> None:
    """The resumed epoch has each record exactly once, counted from the checkpoint, the next one is whole, and all are validated."""
    killed = run(frameworks, photographs, tmp_path, launch(file, before), kill=True)
    assert sorted(record for batch in killed.ids[0] for record in batch) == sorted(order[0])
    resumed = run(frameworks, photographs, tmp_path, launch(file, after), kill=False)
    first, *others = sorted(resumed.ids)
    rest = [record for batch in resumed.ids[first] for record in batch]
    restored = len(order[first]) - len(rest)  # the position in the checkpoint
    assert 0 < restored <= sum(map(len, killed.ids[first])), "resumed in the middle of the epoch in which it was killed"
    assert sorted(rest) == sorted(order[first][restored:])
    if after == 1:
        assert rest == order[first][restored:]
    assert set(order[first][:restored]) <= {record for batch in killed.ids[first] for record in batch}
    assert [sorted(record for batch in resumed.ids[epoch] for record in batch) for epoch in others] == [sorted(each) for each in order[first + 1 : EPOCHS]]  # fmt: skip
    validated = killed.accuracies[:first] + resumed.accuracies
    assert validated == [10 if file == "ignite_engine.py" else 160] * EPOCHS, "batches, or samples"
