"""The environment with the frameworks of examples/, made once.

Rules of this file:

- The environment sees the packages of ``.venv`` through a ``.pth`` file and holds only what the frameworks add, with the
  versions in examples/constraints.txt. So its torch is the project's, and its PIL is Pillow-SIMD: that is checked.
- The inputs of the environment are in its ``ready.json``, which is written last: an interrupted set-up is repeated.
- LOADER_SERVICE_EXAMPLES_VENV names another folder for it, such as one that a build server keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Final

from tools.errors import ToolFailed

ROOT: Final = Path(__file__).resolve().parent.parent.parent
VENV: Final = Path(os.environ.get("LOADER_SERVICE_EXAMPLES_VENV") or ROOT / "build" / "examples-venv").absolute()
CONSTRAINTS: Final = ROOT / "examples" / "constraints.txt"

RUN: Final = "LOADER_SERVICE_RUN_EXAMPLES"
"""The variable whose presence lets the tests of the examples run: they take minutes, and `make test` skips them."""

FRAMEWORKS: Final = (
    "lightning",
    "accelerate",
    "transformers",
    "pytorch-ignite",
    "jax",
    "orbax-checkpoint",
    "nbclient",
    "ipykernel",
)


def recipe() -> dict[str, str]:
    """Return the inputs of the environment; while they equal those in its ready.json, there is nothing to do."""
    files = (CONSTRAINTS, ROOT / "constraints.txt", Path(__file__))
    return {
        "inputs": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest(),
        "packages": sysconfig.get_path("purelib"),
        "python": sys.version,
    }


def is_ready() -> bool:
    """Return whether the environment exists and is made of the present inputs."""
    try:
        return bool(json.loads((VENV / "ready.json").read_text(encoding="utf-8")) == recipe())
    except (OSError, ValueError):
        return False


def make_environment() -> None:
    """Make the environment anew.

    Raises:
        ToolFailed: pip failed, or the environment's PIL is not the project's.
    """
    venv.create(VENV, clear=True, with_pip=True)
    python = VENV / "bin" / "python"
    packages = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # After its own packages, those of .venv; and this checkout, since an editable package's own .pth is not followed.
    (packages / "project.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n", encoding="utf-8")
    pins = (argument for file in (CONSTRAINTS, ROOT / "constraints.txt") for argument in ("--constraint", str(file)))
    _output(str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *pins, *FRAMEWORKS)
    ours, theirs = (_output(each, "-c", "import PIL; print(PIL.__version__)") for each in (sys.executable, str(python)))
    if ours != theirs or any(packages.glob("[pP]illow-*.dist-info")):
        raise ToolFailed(f"the examples' environment has PIL {theirs.strip()}, the project has {ours.strip()}")
    (VENV / "ready.json").write_text(json.dumps(recipe(), indent=2) + "\n", encoding="utf-8")


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=VENV, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolFailed(f"`{' '.join(command)}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
