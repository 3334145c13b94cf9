"""Builds of the extensions apart from the installed ones: with sanitizers, with coverage, without vectors, for another machine.

A build is a copy of the package loader_service whose extensions are compiled with other flags. It stands first on PYTHONPATH,
so child processes use it too. The installed extensions are never touched.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tools.environment import compiler
from tools.errors import ToolFailed
from tools.terminal import ROOT

PACKAGE: Final = ROOT / "loader_service"
SOURCES: Final = (PACKAGE / "data" / "_kernel.c", PACKAGE / "data" / "_jpeg.c")
WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")


def own_compiler() -> list[str]:
    """Return the command of the C compiler that the installation uses."""
    return shlex.split(compiler(os.environ))


def zig() -> list[str] | None:
    """Return the command of the C compiler in the package ziglang, a clang that compiles for any machine; None without it."""
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def compile_extension(source: Path, out: Path, cc: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Compile one extension.

    Raises:
        ToolFailed: the compiler refuses it, or there is no such compiler.
    """
    include = f"-I{sysconfig.get_path('include')}"
    command = [*cc, "-shared", "-fPIC", *WARNINGS, *flags, include, str(source), "-o", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolFailed(f"{cc[0]} cannot be run: {error.strerror}.") from error
    if done.returncode:
        raise ToolFailed(f"{' '.join(cc)} cannot compile {source.name}: {done.stderr.strip()[-2000:]}")


def build(folder: Path, cc: Sequence[str], flags: Sequence[str]) -> None:
    """Make a build in ``folder``, which is emptied first.

    Raises:
        ToolFailed: an extension cannot be compiled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.c", "*.h", "__pycache__"))
    for source in SOURCES:
        name = source.stem + sysconfig.get_config_var("EXT_SUFFIX")
        compile_extension(source, folder / PACKAGE.name / "data" / name, cc, flags)


def environment(folder: Path, preload: Sequence[Path] = (), **variables: str) -> dict[str, str]:
    """Return the environment of a process that uses a build.

    Args:
        folder: the build.
        preload: libraries to load before all others.
        variables: more variables.
    """
    own: Mapping[str, str] = {
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "PYTHONSAFEPATH": "1",  # `python -m` otherwise puts the working directory, and its package, first
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    loaded = {"LD_PRELOAD": " ".join(map(str, preload))} if preload else {}
    return {**os.environ, **own, **loaded, **variables}
