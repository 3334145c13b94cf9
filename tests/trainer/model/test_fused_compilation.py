"""The Triton kernels compile for GPUs, ahead of time and without one.

Triton's interpreter, which the other tests use, accepts kernels that its compiler refuses: it ignores annotations, for
example. A process either interprets or compiles, so this file runs itself as a script in processes that compile.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)
"""A100, H100 and B200."""

FORMS = list(itertools.product(("forward", "backward"), ("fp32", "bf16"), (48, 128), (True, False)))
"""Pass, dtype of the maps, channels of a tower's conv1 or conv2 at width 1, and ReLU before LRN or after the pooling."""


EVERY = list(itertools.product(CAPABILITIES, FORMS))
FEW = EVERY[::7]
"""Seven of the 48: each GPU and each value of each part of a form occurs."""


def compiled(kernels: list[tuple[int, tuple[str, str, int, bool]]]) -> dict[str, int]:
    """Compile forms for GPUs; return the size of each. Triton's cache keeps them until a kernel or Triton changes."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    cache = root / "build" / "triton"
    environ = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    parts = min(4, os.cpu_count() or 1)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(kernels[part::parts])],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    results = [(*process.communicate(), process.returncode) for process in running]
    assert [stderr[-2000:] for _, stderr, code in results if code] == []
    lines = [line.rsplit(maxsplit=1) for stdout, _, _ in results for line in stdout.splitlines()]
    return {name: int(size) for name, size in lines}


def assert_compiled(kernels: list[tuple[int, tuple[str, str, int, bool]]]) -> None:
    sizes = compiled(kernels)
    assert len(sizes) == len(kernels)
    assert min(sizes.values()) > 0


def test_kernels_compile() -> None:
    """Forms with each value of each option compile to machine code, for each GPU."""
    parts = [(capability, *form) for capability, form in FEW]
    assert [set(values) for values in zip(*parts, strict=True)] == [
        set(values) for values in zip(*((capability, *form) for capability, form in EVERY), strict=True)
    ]
    assert_compiled(FEW)


@pytest.mark.long
@pytest.mark.timeout(600)  # 48 compilations of 2 to 3 s if nothing is cached, on a machine that may be busy
def test_all_kernels_compile() -> None:
    """All 16 forms compile to machine code, for all three GPUs."""
    assert_compiled(EVERY)


def _compile(capability: int, form: tuple[str, str, int, bool]) -> int:
    """Compile one form as a launch would; return the bytes of its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.model import fused_triton

    which, dtype, channels, relu_first = form
    kernel = {"forward": fused_triton._forward_kernel, "backward": fused_triton._backward_kernel}[which]
    block_c, block_x = fused_triton._blocks(channels)
    constants = {"side": 3, "relu_first": relu_first, "block_c": block_c, "block_x": block_x}
    if relu_first:
        constants |= {"map_c": 1, "out_c": 1}  # a launch with channels-last tensors makes strides of 1 constants
    types = {"winners": "*u8", "alpha": "fp32"} | dict.fromkeys(("maps", "pooled", "gradient", "back"), f"*{dtype}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # Addresses of torch's tensors are multiples of 16, of which launches inform the compiler.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


if __name__ == "__main__":
    for capability, form in json.loads(sys.argv[1]):
        print(capability, *form, _compile(capability, form))  # noqa: T201 -- the result
