"""The fuzzing tool in a short run, and proof that it finds broken decoders."""

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

from loader_service.data import kernel
from loader_service.datasets.progress import Progress
from loader_service.wire import messages
from tools.errors import ToolFailed
from tools.fuzz import fuzz_decoders, fuzz_jpegs

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not kernel.decodes_windows(), reason="no compiled decoder for this processor")
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_jpegs(seed: int) -> None:
    """Parts have libjpeg-turbo's pixels or its refusals; enough are decoded in part to reach deep into the decoder."""
    with Progress("jpegs", 3000, "inputs") as progress:
        in_part, refused = fuzz_jpegs(Random(seed), 3000, progress)
    assert in_part > 100
    assert refused > 1500


@pytest.mark.parametrize("decode_window", [lambda *_: True, lambda _, into, *__: into.fill(7) or True])
def test_a_broken_decoder_of_jpegs_is_found(
    monkeypatch: pytest.MonkeyPatch, decode_window: Callable[..., bool]
) -> None:
    """A decoder that accepts what libjpeg-turbo refuses, or makes other pixels, fails with the input in the message."""
    monkeypatch.setattr(kernel, "decode_window", decode_window)
    with pytest.raises(ToolFailed, match=r" [0-9a-f]*\.$"), Progress("jpegs", 100, "inputs") as progress:
        fuzz_jpegs(Random(1), 100, progress)


def test_a_few_thousand_inputs(dataset_dir: Path) -> None:
    """Decoders and a node withstand them, and enough inputs are valid to reach deep."""
    command = [sys.executable, "-m", "tools.fuzz", "--seed", "1", "--inputs", "4000", "--data", str(dataset_dir)]
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
