"""Fuzzing guided by coverage: libFuzzer keeps each input that reaches something new, and goes on from it.

libFuzzer comes with the package atheris, and runs in a process of its own (see ``libfuzzer``). The extensions are compiled for
coverage, with the address sanitizer, by the clang in the package ziglang. What libFuzzer keeps stays in build/fuzz, and the
next run begins with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Final

from loader_service.data import kernel
from loader_service.wire import messages
from tools.errors import ToolFailed
from tools.fuzz.jpegs import SHAPES, Corpus
from tools.fuzz.messages import from_client, from_node
from tools.sanitize.builds import build, environment, zig
from tools.terminal import ROOT

FOLDER: Final = ROOT / "build" / "fuzz"
FLAGS: Final = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize=all", "-fsanitize=address"),
    "-fsanitize-coverage=inline-8bit-counters,pc-table,trace-cmp",
    # ziglang's runtime does not look at the CPU; missing() has asked the installed extension.
    "-D__builtin_cpu_supports(feature)=1",
)
MAX_BYTES: Final = 8192
"""Longest input: the valid JPEGs are shorter."""

KINDS: Final = ("messages", "jpegs")


def missing(kind: str) -> str:
    """Return why guided fuzzing of one kind cannot run here; empty if it can."""
    if kind == "jpegs" and not kernel.decodes_windows():
        return "this processor has no decoder of parts"
    lacking = [name for name in ("atheris", "ziglang") if find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed (pip install '.[fuzz]')" if lacking else ""


def seeds(kind: str) -> list[bytes]:
    """Return the first inputs: valid ones, and JPEGs with damage to a segment."""
    if kind == "messages":
        return [
            bytes((side,)) + messages.encode(each)
            for side, sent in ((1, from_client()), (0, from_node()))
            for each in sent
        ]
    corpus = Corpus(Random(1))  # noqa: S311 - inputs need not be hard to guess
    valid = [bytes((SHAPES.index(shape),)) + each for shape, every in corpus.valid.items() for each in every]
    return valid + [bytes((SHAPES.index(shape),)) + each for each, shape in (corpus.damaged() for _ in range(300))]


def fuzz_guided(kind: str, inputs: int, seed: int, folder: Path = FOLDER) -> tuple[int, int]:
    """Give inputs to the decoders of one kind; return how many libFuzzer kept, and how many places in the code they reach.

    Raises:
        ToolFailed: an input broke a rule, or a sanitizer found something; the message says where the input is stored.
    """
    copy, compiler = folder / f"{kind}-build", zig()
    assert compiler is not None, missing(kind)
    build(copy, compiler, FLAGS)
    corpus = folder / f"{kind}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(seeds(kind)):
        (corpus / f"seed-{number:04}").write_bytes(each)
    environ = environment(
        copy, [_runtime()], PYTHONMALLOC="malloc", ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1"
    )
    command = [
        sys.executable,
        "-m",
        "tools.fuzz.libfuzzer",
        kind,
        str(corpus),
        f"-runs={inputs}",
        f"-seed={seed % 2**32 or 1}",
    ]
    command += [f"-artifact_prefix={folder}/{kind}-", f"-max_len={MAX_BYTES}", "-print_final_stats=1", "-timeout=20"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, errors="replace", check=False
    )
    if ended.returncode:
        # The report is above libFuzzer's last words, which name the file of the input.
        at = max(ended.stderr.find("ERROR: AddressSanitizer"), ended.stderr.find("Uncaught Python exception"), 0)
        raise ToolFailed(
            f"guided fuzzing of {kind} failed; the input is in {folder}/{kind}-*: {ended.stderr[at : at + 3000].strip()}"
        )
    reached = re.findall(r"cov: (\d+) ", ended.stderr)
    return len(list(corpus.iterdir())), int(reached[-1]) if reached else 0


def _runtime() -> Path:
    """Return atheris's address sanitizer, which contains libFuzzer."""
    found = find_spec("atheris")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent.parent / "asan_with_fuzzer.so"
