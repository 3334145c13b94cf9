"""Preparation of a Python that has PyTorch but not this project's other packages, without a network.

Rules of this file:

- It runs before anything is installed, so it imports the standard library alone.
- Nothing is installed into the Python itself: packages that it lacks come from a folder of wheels into build/gpu/site, which
  is on PYTHONPATH for this command only. Packages that it has are used as they are.
- The C extensions are compiled into their places, by the compiler that is there; without one, the slower forms serve.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info >= (3, 11):  # noqa: UP036 -- this file runs under any Python
    import tomllib  # an older Python gets as far as check_python(), which refuses it in a sentence

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = ROOT / "build" / "gpu" / f"site-{sys.implementation.cache_tag}"
PYTHONS = ((3, 11), (3, 13))
TORCH = (2, 4)

TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil", "packaging")
"""Packages of the extra `dev` that the tests on a GPU and the benchmarks need."""


def say(line: str) -> None:
    """Print one line of progress and flush it."""
    sys.stderr.write(f"gpu: {line}\n")
    sys.stderr.flush()


def fail(sentence: str) -> NoReturn:
    """Print one sentence and exit with code 1."""
    say(sentence)
    raise SystemExit(1)


def project() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> dict[str, tuple[int, ...]]:
    """Return the packages needed besides torch, each with its lowest version; () accepts any.

    Stock Pillow stands for Pillow-SIMD, which has no wheels: only preprocessing resizes, and other bytes come of it.
    """
    about = project()["project"]
    extras = about["optional-dependencies"]
    wanted = [line for line in extras["dev"] if named(line) in TEST_TOOLS]
    found = {}
    for line in [*about["dependencies"], *extras["trainer"], *wanted]:
        name = named(line)
        if name == "pillow-simd" or name == "torch":
            continue
        found[name] = lowest(line)
    return found


def named(requirement: str) -> str:
    """Return the name in a requirement, normalised: tensorboardX>=2.6 -> tensorboardx."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def lowest(requirement: str) -> tuple[int, ...]:
    """Return the lowest version that a requirement accepts: pyzmq>=26.4 -> (26, 4)."""
    match = re.search(r">=([\d.]+)", requirement)
    return numbers(match[1]) if match else ()


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: 2.11.0+cu130 -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def versions() -> dict[str, tuple[int, ...]]:
    """Return the version of every package that this Python sees, by normalised name."""
    found: dict[str, tuple[int, ...]] = {}
    for each in importlib.metadata.distributions():
        if each.metadata["Name"]:
            found.setdefault(named(each.metadata["Name"]), numbers(each.version))  # the first on the path counts
    if "pillow-simd" in found:
        found["pillow"] = found["pillow-simd"]
    return found


def missing(wanted: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the wanted packages that are absent or too old, sorted."""
    return sorted(name for name, least in wanted.items() if name not in have or have[name] < least)


def needed_wheels(
    folder: Path, wanted: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]]
) -> list[Path]:
    """Return the wheels of a folder whose packages are absent here or too old; ``wanted`` has the lowest versions."""
    chosen = []
    for wheel in sorted(folder.glob("*.whl")):
        name = named(wheel.name.partition("-")[0])
        if name not in have or have[name] < wanted.get(name, ()):
            chosen.append(wheel)
    return chosen


def install(wheels: Sequence[Path]) -> None:
    """Install wheels into SITE, without a network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    command += ["--no-compile", "--no-warn-script-location", "--upgrade", "--target", str(SITE), *map(str, wheels)]
    say(f"installing {len(wheels)} packages into {SITE.relative_to(ROOT)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
        fail(f"the wheels cannot be installed ({errors[0].strip()}); make them for this Python: {remedy()}.")


def remedy() -> str:
    """Return the commands that provide packages."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"`make gpu-wheels PYTHON_VERSION={version} WHEELS=DIR` where there is a network, then WHEELS=DIR here"


def check_python(version: tuple[int, int]) -> str:
    """Return the sentence that refuses a version of Python; empty if it will do."""
    low, high = PYTHONS
    if low <= version <= high:
        return ""
    spans = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return f"this Python is {version[0]}.{version[1]}, but {spans} is needed; name another one with PYTHON=python3.12."


def check_torch(have: Mapping[str, tuple[int, ...]]) -> str:
    """Return the sentence that refuses a PyTorch; empty if it will do."""
    if "torch" not in have:
        return (
            f"{sys.executable} has no PyTorch; name a Python that has it, with PYTHON=, or leave PYTHON out for .venv."
        )
    if have["torch"] < TORCH:
        shown = ".".join(map(str, have["torch"]))
        return f"PyTorch {shown} is too old; {TORCH[0]}.{TORCH[1]} or newer is needed."
    return ""


def extensions() -> Iterator[tuple[Path, list[str], list[Path]]]:
    """Yield the target, the compiler's arguments and the inputs of each C extension in pyproject.toml."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for each in project()["tool"]["setuptools"]["ext-modules"]:
        target = ROOT / (each["name"].replace(".", "/") + suffix)
        sources = [ROOT / source for source in each["sources"]]
        yield (
            target,
            [*each.get("extra-compile-args", []), *map(str, sources)],
            [*sources, *(ROOT / header for header in each.get("depends", []))],
        )


def compile_extensions() -> None:
    """Compile the extensions that are absent or older than their sources; without a compiler, say so and go on."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    for target, arguments, inputs in extensions():
        if target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in inputs):
            continue
        partial = target.with_name(f"{target.name}.partial")
        command = [*compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", *arguments, "-o", str(partial)]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except OSError as error:
            problem = [str(error)]
        if problem:
            say(f"{target.name} cannot be compiled, so loaders are slower here ({problem[0]})")
        else:
            partial.replace(target)


def main() -> None:
    """Prepare, then become ``tools.gpu.start``, with the remaining arguments."""
    arguments, wheels = sys.argv[1:], ""
    if arguments[:1] == ["--wheels"]:
        wheels, arguments = (arguments[1:2] or [""])[0], arguments[2:]
    if problem := check_python(sys.version_info[:2]):
        fail(problem)
    sys.path.insert(0, str(SITE))
    if problem := check_torch(versions()):
        fail(problem)
    wanted = requirements()
    if wheels and not Path(wheels).is_dir():
        fail(f"WHEELS={wheels} is no folder; make one: {remedy()}.")
    try:
        if wheels and (chosen := needed_wheels(Path(wheels), wanted, versions())):
            install(chosen)
            importlib.invalidate_caches()
        if lacking := missing(wanted, versions()):
            fail(f"this Python lacks {', '.join(lacking)}; bring wheels: {remedy()}.")
        compile_extensions()
    except OSError as error:
        fail(f"{error.filename or ROOT} cannot be used: {error.strerror}.")
    except KeyboardInterrupt:
        fail("stopped.")
    path = os.pathsep.join([str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.chdir(ROOT)
    # exec: a signal to make's child reaches the command, which keeps what was measured.
    os.execve(  # noqa: S606 -- the same Python
        sys.executable, [sys.executable, "-m", "tools.gpu.start", *arguments], {**os.environ, "PYTHONPATH": path}
    )
