"""The start of ``tools.gpu.command``, which imports PyTorch: one that is installed but broken is reported in a sentence."""

from __future__ import annotations

from tools.gpu.prepare import fail

try:
    from tools.gpu.command import main
except (ImportError, OSError) as error:  # OSError: a shared library of PyTorch is missing
    fail(f"PyTorch or another package cannot be imported: {' '.join(str(error).split())}.")

if __name__ == "__main__":
    main(prog_name="gpu")
