"""The Triton kernels compile for GPUs, ahead of time and without one.

Triton's interpreter, which the other tests use, accepts kernels that its compiler refuses: it ignores annotations, for
example. A process either interprets or compiles, so this file runs itself as a script in processes that compile.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)
"""A100, H100 and B200."""

FORMS = list(itertools.product(("forward", "backward"), ("fp32", "bf16"), (48, 128), (True, False)))
"""Pass, dtype of the maps, channels of a tower's conv1 or conv2 at width 1, and ReLU before LRN or after the pooling."""


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> list[str]:
    """Compile every form for every GPU; return a line for each. Triton's cache keeps them until a kernel or Triton changes."""
    pytest.importorskip("triton")
    cache = pytestconfig.cache.mkdir("triton")
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environ = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    parts = min(4, os.cpu_count() or 1)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(part), str(parts)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    results = [(*process.communicate(), process.returncode) for process in running]
    assert [stderr[-2000:] for _, stderr, code in results if code] == []
    return [line for stdout, _, _ in results for line in stdout.splitlines()]


@pytest.mark.timeout(600)  # 48 compilations of 2 to 3 s if nothing is cached, on a machine that may be busy
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_kernels_compile(capability: int, compiled: list[str]) -> None:
    """All 16 forms compile to machine code."""
    sizes = [int(line.split()[-1]) for line in compiled if line.startswith(f"{capability} ")]
    assert len(sizes) == len(FORMS)
    assert min(sizes) > 0


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
    part, parts = map(int, sys.argv[1:])
    for capability, form in list(itertools.product(CAPABILITIES, FORMS))[part::parts]:
        print(capability, *form, _compile(capability, form))  # noqa: T201 -- the result
