"""The peers' environments, under ``build/bench/venvs``: made when a peer is first asked for, each on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tools.errors import ToolFailed

ENVIRONMENTS: Final = Path("build/bench/venvs")

TORCH: Final = ("torch==2.13.0", "numpy<2.5", "pillow")

PEERS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "dataloader": ((*TORCH, "lmdb==3.0.0", "simplejpeg==1.9.0"),),
    "dali": (("nvidia-dali-cuda120==2.4.0", "numpy"),),
    "ffcv": (
        ("setuptools<81", "wheel", "opencv-python-headless", "numba", "assertpy", "terminaltables", "fastargs", "tqdm"),
        (*TORCH, "pandas", "psutil"),
        ("--no-build-isolation", "ffcv==1.0.2"),  # compiled here: needs libopencv-dev and libturbojpeg0-dev
    ),
    "spdl": (("spdl-core==0.8.0", "spdl-io==0.8.0", "numpy", "simplejpeg==1.9.0"),),
    "tfdata": (("tensorflow-cpu==2.21.0",),),
}
"""What to hand to pip, call by call."""

TRAINERS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {"torchvision": ((*TORCH, "torchvision"),)}
"""Likewise, for what the trainer is measured beside."""


class NotInstalled(ToolFailed):
    """A peer's packages do not install on this machine; the message says why."""


def python_of(peer: str, root: Path) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Raises:
        NotInstalled: it cannot be.
    """
    folder = root / ENVIRONMENTS / peer
    python, marker = folder / "bin" / "python", folder / "ready.txt"
    recipe = (PEERS | TRAINERS)[peer]
    wanted = repr(recipe)
    if marker.exists() and marker.read_text() == wanted:
        return python
    _run(peer, [sys.executable, "-m", "venv", str(folder)])
    for arguments in recipe:
        _run(peer, [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments])
    marker.write_text(wanted)
    return python


def versions(peer: str) -> str:
    """What a peer's environment holds of what was pinned: ``name version, ...``."""
    pins = [argument for arguments in (PEERS | TRAINERS)[peer] for argument in arguments if "==" in argument]
    python = sys.version_info
    return ", ".join([pin.replace("==", " ") for pin in pins] + [f"Python {python.major}.{python.minor}"])


def _run(peer: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error"))] or [
            done.stderr[-200:]
        ]
        raise NotInstalled(f"{peer} does not install here: {said[-1].strip()}")
