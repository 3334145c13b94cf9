"""The contestants: this project, the limits of the machine, and peers, each in a virtual environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tools.bench.contest import Contestant, Kind
from tools.errors import ToolFailed

FORMS: Final = {
    "dataloader": {
        "raw": "PyTorch DataLoader, LMDB raw",
        "jpeg": "PyTorch DataLoader, LMDB jpeg, libjpeg-turbo",
        "files": "PyTorch DataLoader, JPEG files, PIL",
    },
    "dali": {"jpeg": "DALI (CPU), JPEG files"},
    "ffcv": {"raw": "FFCV raw", "jpeg": "FFCV jpeg"},
    "spdl": {"jpeg": "SPDL, JPEG files, libjpeg-turbo"},
    "tfdata": {"raw": "tf.data service, TFRecord raw", "jpeg": "tf.data service, TFRecord jpeg"},
}
"""The forms in which each peer is measured, and their titles."""

APART: Final = ("tfdata",)
"""Peers in groups of their own: their service keeps filling its buffers while others are measured."""


def limits(records: Path, workers: int) -> list[Contestant]:
    """Return the limits of the machine; copying and decoding use as many processes as a node has workers."""

    def limit(name: str, title: str, codec: str, copies: int, group: str) -> Contestant:
        command = (sys.executable, "-m", "tools.bench.limits", name, str(records / codec / "train.lmdb"))
        return Contestant(name, title, codec, Kind.LIMIT, command, copies, group)

    return [
        limit("memcpy", "limit: C memcpy of the crops", "raw", workers, "raw"),
        # One copy each: a pair of processes at the ends of one connection.
        limit("zmq", "limit: ZeroMQ alone, TCP", "raw", 1, "tcp"),
        limit("zmq-curve", "limit: ZeroMQ alone, TCP, CURVE", "raw", 1, "tcp"),
        limit("decode", "limit: libjpeg-turbo decoding", "jpeg", workers, "jpeg"),
    ]


def ours(records: Path, workers: int) -> list[Contestant]:
    """Return this project with each transport and codec; over TCP also by one connection, in place of the default number."""
    tcp, one = ("--transport", "tcp"), ("--defaults", "CONNECTIONS=1")

    def way(name: str, title: str, codec: str, group: str, *options: str) -> Contestant:
        data = str(records / codec)
        command = (sys.executable, "-m", "tools.bench.ours", data, "--workers", str(workers), *options)
        return Contestant(f"ours-{name}", f"**this project**, {title}", codec, Kind.OURS, command, group=group)

    return [
        way("raw-shm", "shared memory, raw", "raw", "raw"),
        way("raw-shm-curve", "shared memory, with CURVE for messages, raw", "raw", "raw", "--curve"),
        way("raw-tcp", "TCP, raw", "raw", "tcp", *tcp),
        way("raw-tcp-1", "TCP, one connection, raw", "raw", "tcp", *tcp, *one),
        way("raw-curve", "TCP with CURVE, raw", "raw", "tcp", *tcp, "--curve"),
        way("raw-curve-1", "TCP with CURVE, one connection, raw", "raw", "tcp", *tcp, "--curve", *one),
        way("jpeg-shm", "shared memory, jpeg", "jpeg", "jpeg"),
        way("jpeg-tcp", "TCP, jpeg", "jpeg", "jpeg", *tcp),
    ]


def peers(records: Path, workers: int, pythons: Mapping[str, Path]) -> list[Contestant]:
    """Return the installed peers in all their forms; ``pythons`` has the interpreter of each."""
    return [
        Contestant(
            f"{peer}-{form}",
            title,
            "raw" if form == "raw" else "jpeg",
            Kind.PEER,
            # That interpreter lacks this project: -m finds `tools` in ROOT, where Running starts every contestant.
            (str(python), "-m", f"tools.bench.peers.{peer}", form, str(records), str(workers)),
            # A peer's group is the limit's that bounds it, except for services that keep working between turns.
            group=peer if peer in APART else "raw" if form == "raw" else "jpeg",
        )
        for peer, python in pythons.items()
        for form, title in FORMS[peer].items()
    ]


ENVIRONMENTS: Final = Path("build/bench/venvs")

TORCH: Final = ("torch==2.13.0", "numpy<2.5", "pillow")

PEERS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "dataloader": ((*TORCH, "lmdb==3.0.0", "simplejpeg==1.9.0"),),
    "dali": (("nvidia-dali-cuda120==2.4.0", "numpy"),),
    "ffcv": (
        # First: --no-build-isolation below builds with the packages that are installed by then.
        ("setuptools<81", "wheel", "opencv-python-headless", "numba", "assertpy", "terminaltables", "fastargs", "tqdm"),
        (*TORCH, "pandas", "psutil"),
        ("--no-build-isolation", "ffcv==1.0.2"),  # compiled here: needs libopencv-dev and libturbojpeg0-dev
    ),
    "spdl": (("spdl-core==0.8.0", "spdl-io==0.8.0", "numpy", "simplejpeg==1.9.0"),),
    "tfdata": (("tensorflow-cpu==2.21.0",),),
}
"""Arguments of pip, call by call."""

TRAINERS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {"torchvision": ((*TORCH, "torchvision"),)}
"""Arguments of pip for the peers of the trainer's benchmark."""


class NotInstalled(ToolFailed):
    """Raised when a peer's packages do not install on this machine; the message has the reason."""


def python_of(peer: str, root: Path) -> Path:
    """Return the interpreter of a peer's environment; make the environment first if it does not exist.

    Raises:
        NotInstalled: the environment cannot be made.
    """
    folder = root / ENVIRONMENTS / peer
    python, marker = folder / "bin" / "python", folder / "ready.txt"
    recipe = (PEERS | TRAINERS)[peer]
    wanted = repr(recipe)
    if marker.exists() and marker.read_text() == wanted:  # another recipe installs again
        return python
    _run(peer, [sys.executable, "-m", "venv", str(folder)])
    for arguments in recipe:
        _run(peer, [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments])
    marker.write_text(wanted)  # last: an interrupted installation is done again
    return python


def versions(peer: str) -> str:
    """Return a peer's pinned packages and its Python version: ``name version, ...``."""
    pins = [argument for arguments in (PEERS | TRAINERS)[peer] for argument in arguments if "==" in argument]
    python = sys.version_info
    return ", ".join([pin.replace("==", " ") for pin in pins] + [f"Python {python.major}.{python.minor}"])


def _run(peer: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # pip's reason is its last line of this kind; without one, the end of its output is quoted.
        said = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error"))] or [
            done.stderr[-200:]
        ]
        raise NotInstalled(f"{peer} does not install here: {said[-1].strip()}")
