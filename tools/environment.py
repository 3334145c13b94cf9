"""Set-up of ``.venv`` for every target of the Makefile: once, pinned, with Pillow-SIMD compiled for this processor.

Rules of this file:

- It runs under the user's Python before anything is installed, so it imports the standard library alone.
- It runs before every target, so it must find within a tenth of a second that there is nothing to do. The inputs of
  ``.venv`` (digest of pyproject.toml, constraints.txt and C sources, Python, folder, extras) are in ``.venv/ready.json``,
  which is written last: an interrupted set-up is repeated.
- Pillow-SIMD and stock Pillow both install a package named PIL; the last one installed wins, and they resize to different
  bytes. So every run looks for stock Pillow, and removes it on machines that use Pillow-SIMD.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
READY = VENV / "ready.json"
LOG = ROOT / "build" / "setup.log"
LOG_LINES_SHOWN = 30

# The second pins build requirements, which pip installs apart.
PINS = ("--constraint", "constraints.txt", "--build-constraint", "constraints.txt")

INSTALL_COMMANDS = {
    "apt-get": "Debian, Ubuntu:  sudo apt-get install",
    "dnf": "Fedora:          sudo dnf install",
    "pacman": "Arch:            sudo pacman -S",
    "apk": "Alpine:          sudo apk add",
}
"""The install command of each package manager, by the name of its program."""

PREREQUISITES = {
    "a working C compiler": ("", {"apt-get": "gcc libc6-dev", "dnf": "gcc", "pacman": "gcc", "apk": "gcc musl-dev"}),
    "Python's headers": (
        "Python.h",
        {"apt-get": "python3-dev", "dnf": "python3-devel", "pacman": "python", "apk": "python3-dev"},
    ),
    "libjpeg's headers": (
        "jpeglib.h",
        {"apt-get": "libjpeg-dev", "dnf": "libjpeg-turbo-devel", "pacman": "libjpeg-turbo", "apk": "libjpeg-turbo-dev"},
    ),
    "zlib's headers": (
        "zlib.h",
        {"apt-get": "zlib1g-dev", "dnf": "zlib-devel", "pacman": "zlib", "apk": "zlib-dev"},
    ),
}
"""Prerequisites of compiling Pillow-SIMD: a header that proves each, and the packages that provide it."""


def say(line: str) -> None:
    """Print one line of progress and flush it."""
    sys.stdout.write(f"set-up: {line}\n")
    sys.stdout.flush()


def fail(sentence: str) -> NoReturn:
    """Print one sentence and exit with code 1."""
    sys.stderr.write(f"set-up: {sentence}\n")
    raise SystemExit(1)


def wants_simd(machine: str) -> bool:
    """Return whether machines of this architecture use Pillow-SIMD; pyproject.toml has the same condition."""
    return machine == "x86_64"


def compiler(environ: Mapping[str, str]) -> str:
    """Return the C compiler's command: ``$CC``, else the first of cc, gcc and clang on PATH, else cc."""
    return environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")


def compiler_for_simd(cc: str, cpuinfo: str) -> str:
    """Return the compiler's command, with AVX2 if ``/proc/cpuinfo`` lists it, else with SSE4, Pillow-SIMD's default."""
    # A whole word in a line of flags, so no model name matches.
    has_avx2 = any(line.startswith("flags") and "avx2" in line.split() for line in cpuinfo.splitlines())
    return f"{cc} -mavx2" if has_avx2 else cc


def compiles(cc: str, header: str) -> bool:
    """Return whether the compiler runs and finds ``header`` and the C library's headers."""
    # stdio.h in all cases: a compiler without the C library's headers runs, but compiles nothing.
    source = "#include <stdio.h>\n" + (f"#include <{header}>\n" if header else "")
    # $CC may hold a launcher or flags.
    command = [*shlex.split(cc), "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c", "-"]
    try:
        return subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode == 0
    except OSError:  # there is no such program
        return False


def missing_prerequisites(cc: str) -> list[str]:
    """Return the PREREQUISITES that this machine lacks; only the compiler if it lacks that, since it finds the headers."""
    if not compiles(cc, ""):
        return ["a working C compiler"]
    return [name for name, (header, _) in PREREQUISITES.items() if not compiles(cc, header)]


def remedy(missing: list[str], managers: list[str]) -> str:
    """Return a message that lists what is missing, with the commands of these package managers that install it."""
    lines = [f"Pillow-SIMD must be compiled, and this machine lacks {', '.join(missing)}. Install, then try again:"]
    for manager in managers:
        packages = " ".join(PREREQUISITES[name][1][manager] for name in missing)
        lines.append(f"    {INSTALL_COMMANDS[manager]} {packages}")
    return "\n".join(lines)


def compiled_sources() -> list[Path]:
    """Return the C files that the installation compiles."""
    return sorted(path for path in (ROOT / "loader_service").rglob("*") if path.suffix in (".c", ".h"))


def recipe(extras: str) -> dict[str, str]:
    """Return the inputs of ``.venv``; while they equal READY's, there is nothing to do."""
    paths = [ROOT / "pyproject.toml", ROOT / "constraints.txt", *sorted(ROOT.glob("setup.py")), *compiled_sources()]
    return {
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest(),
        "python": platform.python_version(),
        "root": str(ROOT),  # the scripts of an environment contain its path, so a moved one does not run
        "extras": extras,
    }


def made_from() -> dict[str, str]:
    """Return the inputs in READY; empty if ``.venv`` does not exist or was never finished."""
    try:
        read = json.loads(READY.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}  # valid JSON, but not this program's


def made_here() -> bool:
    """Return whether ``.venv`` was made in this folder by this Python: an environment cannot change either."""
    try:
        lines = (VENV / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return False
    facts = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    # `command` exists since Python 3.11, the oldest supported one.
    same = facts.get("version") == platform.python_version() and facts.get("command", "").endswith(f" {VENV}")
    return same and (VENV / "bin" / "python").exists()


def installed(name: str, version: str = "[0-9]*") -> bool:
    """Return whether a distribution is in ``.venv``; ``name`` is spelled as in its dist-info folder."""
    return any(VENV.glob(f"lib/python3.*/site-packages/{name}-{version}.dist-info"))


def pinned(name: str) -> str:
    """Return the version that constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(version for pin, _, version in (line.partition("==") for line in lines) if pin == name)


def pip(*arguments: str, environ: Mapping[str, str] | None = None) -> None:
    """Run ``.venv``'s pip. Its output goes to LOG, and its current line to a terminal; a failure ends this program."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    width = shutil.get_terminal_size().columns - 1  # less one: a full line wraps, and \r returns to its last row
    live = sys.stdout.isatty()
    with (
        LOG.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if live:
                sys.stdout.write(f"\r\033[K{line.strip()[:width]}")  # to the line's start, and erase it
                sys.stdout.flush()
    if live:
        sys.stdout.write("\r\033[K")
    if process.returncode:  # known: the end of the `with` has waited
        tail = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        fail("\n".join(["pip failed; the end of its log:", *tail, f"The whole log is {LOG.relative_to(ROOT)}."]))


def install_simd() -> None:
    """Compile and install Pillow-SIMD, replacing any PIL.

    pip's cache is not used: it does not record the flags that a wheel was compiled with.
    """
    cc = compiler(os.environ)
    missing = missing_prerequisites(cc)
    if missing:
        # On an unknown system, all commands are shown.
        managers = [name for name in INSTALL_COMMANDS if shutil.which(name)] or list(INSTALL_COMMANDS)
        fail(remedy(missing, managers))
    simd_cc = compiler_for_simd(cc, Path("/proc/cpuinfo").read_text())
    say(f"compiling Pillow-SIMD with `{simd_cc}` (about a minute)")
    # First: both own the files of the package PIL, and uninstalling either removes them.
    if installed("pillow"):
        pip("uninstall", "--yes", "pillow")
    pip(
        # --force-reinstall: pip may list pillow-simd as installed although another package's files have replaced its
        # own.
        *("install", "--no-cache-dir", "--force-reinstall", "--no-deps", *PINS, "pillow-simd"),
        environ={**os.environ, "CC": simd_cc},
    )


def make_environment(extras: str) -> None:
    """Create ``.venv``, or update it."""
    if not made_here():
        say(f"making .venv with Python {platform.python_version()}")
        # --clear: scripts of another Python or folder must not stay.
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    if not installed("pip", pinned("pip")):
        pip("install", "--constraint", "constraints.txt", "pip")  # an older pip has no --build-constraint
    # Before this project, which requires it: pip would compile it without the processor's flags, or take a cached
    # wheel.
    if wants_simd(platform.machine()) and not installed("pillow_simd", pinned("pillow-simd")):
        install_simd()
    say(f"installing this project, editable, with its extras {extras} (the first time takes a few minutes)")
    pip("install", *PINS, "--editable", f".[{extras}]")


def repair_pillow() -> None:
    """Reinstall Pillow-SIMD if another installation has replaced it by stock Pillow."""
    if wants_simd(platform.machine()) and installed("pillow"):
        say("stock Pillow was installed over Pillow-SIMD in .venv: removing it")
        install_simd()


@contextmanager
def alone() -> Iterator[None]:
    """Hold the set-up's lock: two targets made at once must not install into one ``.venv``."""
    with LOG.with_suffix(".lock").open("w") as lock:
        try:
            # The kernel frees the lock when this process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(extras: str) -> None:
    """Set ``.venv`` up, or do nothing if it is up to date."""
    if VENV.is_symlink():  # to empty it would empty another folder's environment
        fail(f"{VENV.name} is a link to {VENV.resolve()}: remove the link, and the set-up makes an environment here.")
    LOG.parent.mkdir(exist_ok=True)  # of the log and of the lock
    with alone():
        if made_from() != recipe(extras):  # under the lock: another run may just have made it
            started_s = time.monotonic()
            LOG.write_text("")
            READY.unlink(missing_ok=True)  # before the first change, so that an interrupted set-up is repeated
            make_environment(extras)
            repair_pillow()  # a requirement of an extra may have brought stock Pillow
            READY.write_text(json.dumps(recipe(extras), indent=2) + "\n")
            say(f"ready after {time.monotonic() - started_s:.0f} s")
        else:
            repair_pillow()  # also if nothing changed: a user may have installed it by hand


def main() -> None:
    """Run the command line; see the Makefile."""
    parser = argparse.ArgumentParser(description="Set up .venv for the Makefile's targets.")
    parser.add_argument("--extras", default="trainer,report,dev", help="extras of pyproject.toml to install")
    try:
        run(parser.parse_args().extras)
    except subprocess.CalledProcessError as error:
        fail(f"`{shlex.join(map(str, error.cmd))}` failed.")
    except OSError as error:
        fail(f"{error.filename or ROOT} cannot be used: {error.strerror}.")
    except KeyboardInterrupt:
        fail("stopped; the next make continues from here.")


if __name__ == "__main__":
    main()
