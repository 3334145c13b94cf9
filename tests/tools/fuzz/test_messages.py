"""The fuzzing tool in a short run, and proof that it finds broken decoders of messages."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from loader_service.datasets.progress import Progress
from loader_service.wire import messages
from tools.errors import ToolFailed
from tools.fuzz.messages import fuzz_decoders

ROOT = Path(__file__).parents[3]


def test_a_few_thousand_inputs(dataset_dir: Path) -> None:
    """Decoders and a node withstand them, and enough inputs are valid to reach deep."""
    command = [sys.executable, "-m", "tools.fuzz", "--seed", "1", "--inputs", "4000", "--data", str(dataset_dir)]
    command += ["--only", "decoders", "--only", "jpegs", "--only", "node"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    passed = re.search(r"4,000 inputs, (\d+) of them valid", ended.stdout)
    refused = re.search(r"4,000 inputs, ([\d,]+) refused; it serves the same bytes", ended.stdout)
    assert re.search(r"jpegs: 4,000 inputs, [\d,]+ decoded in part", ended.stdout)
    assert passed
    assert refused
    assert int(passed[1]) > 400
    assert 400 < int(refused[1].replace(",", "")) < 3600


@pytest.mark.parametrize(
    "decode",
    [
        lambda frame: msgspec.msgpack.decode(frame, type=messages.FromClient),
        lambda frame: messages.Request("0" * 32, len(frame), "train", frame, "uint8"),
    ],
    ids=["another exception", "not what it was"],
)
def test_a_broken_decoder_is_found(monkeypatch: pytest.MonkeyPatch, decode: Callable[[bytes], Any]) -> None:
    """A decoder that raises another exception, or decodes another message, fails with the input in the message."""
    monkeypatch.setattr(messages, "decode_from_client", decode)
    with pytest.raises(ToolFailed, match=r" [0-9a-f]*\.$"), Progress("decoders", 1000, "inputs") as progress:
        fuzz_decoders(Random(1), 1000, progress)
