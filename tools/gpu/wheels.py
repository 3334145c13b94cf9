"""``make gpu-wheels``: download the wheels that a machine without a network needs besides its own PyTorch.

The standard library alone is imported: any Python with pip can run it.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from pathlib import Path

from tools.gpu.prepare import ROOT, fail, requirements, say

LIBC = ("2_28", "2_27", "2_26", "2_17", "2_12", "2_5")
"""glibc versions of the platforms that are accepted; pip compares them for equality."""

ALIASES = {"x86_64": ("manylinux2014", "manylinux2010", "manylinux1"), "aarch64": ("manylinux2014",)}
"""Older names of such platforms, by machine."""


def command(folder: Path, version: str, machine: str) -> list[str]:
    """Return pip's command; versions are those of constraints.txt."""
    names = [f"manylinux_{libc}" for libc in LIBC] + list(ALIASES.get(machine, ()))
    platforms = [part for name in names for part in ("--platform", f"{name}_{machine}")]
    return [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--only-binary=:all:"),
        *("--python-version", version, "--implementation", "cp", *platforms),
        *("--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *requirements()),
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the wheels")
    parser.add_argument("--python-version", default="", help="Python of the GPU machine, such as 3.12 [this one's]")
    parser.add_argument("--machine", default=platform.machine(), help="its processor [this one's]")
    given = parser.parse_args()
    version = given.python_version or f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not re.fullmatch(r"3\.1[1-3]", version):
        fail(f"PYTHON_VERSION={version} is not 3.11, 3.12 or 3.13.")
    if given.machine not in ALIASES:
        fail(f"--machine {given.machine} is not one of {', '.join(ALIASES)}.")
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            command(given.folder, version, given.machine), stderr=subprocess.PIPE, text=True, check=False
        )
    except OSError as error:
        fail(f"{error.filename or given.folder} cannot be used: {error.strerror}.")
    except KeyboardInterrupt:
        fail("stopped; the next call continues.")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        fail(f"the wheels cannot be downloaded ({said[-1].strip()}).")
    found = sorted(given.folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in found) / 1e6
    say(f"{len(found)} wheels, {size:.0f} MB, for Python {version} on {given.machine}: {given.folder}")
    say(f"on the GPU machine: make gpu PYTHON=python3 WHEELS={given.folder}")


if __name__ == "__main__":
    main()
