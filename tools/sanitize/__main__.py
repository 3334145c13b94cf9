"""`make sanitize`: the data tests and damaged JPEGs, with extensions that check every access and every operation.

The extensions are compiled with address and undefined-behaviour sanitizers into build/sanitize; the installed ones stay as they
are. A program with planted mistakes runs first: if the sanitizers do not find them here, a clean run would prove nothing.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

import click

from loader_service.cli.job import CONTEXT, Job
from tools.errors import ToolFailed
from tools.sanitize.builds import build, compile_extension, environment, own_compiler
from tools.terminal import ROOT

BUILD: Final = ROOT / "build" / "sanitize"
FLAGS: Final = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

FOUND: Final = 99
"""Exit code of a process in which a sanitizer found something."""

TESTS: Final = ("tests/loader_service/data",)
QUICK_TESTS: Final = tuple(
    f"tests/loader_service/data/test_{name}.py" for name in ("augment", "kernel", "codecs", "golden")
)
"""Tests that call the extensions most; the others use them through fill()."""

INPUTS, QUICK_INPUTS = 100_000, 10_000

PLANTED: Final = """
#include <Python.h>
#include <stdint.h>
static PyObject *overflow(PyObject *module, PyObject *size)
{
    (void)module;
    const long n = PyLong_AsLong(size);
    volatile uint8_t *bytes = malloc((size_t)n);
    bytes[n] = 1; /* the mistake: one byte beyond the end */
    free((void *)bytes);
    Py_RETURN_NONE;
}
static PyObject *add(PyObject *module, PyObject *size)
{
    (void)module;
    const int n = (int)PyLong_AsLong(size);
    return PyLong_FromLong(n + 2147483647); /* the mistake: a signed sum that overflows */
}
static PyMethodDef METHODS[] = {{"overflow", overflow, METH_O, ""}, {"add", add, METH_O, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "planted", "", 0, METHODS, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_planted(void) { return PyModule_Create(&MODULE); }
"""

MISTAKES: Final = {
    "import planted; planted.overflow(24)": "heap-buffer-overflow",
    "import planted; planted.add(1)": "signed integer overflow",
}
"""Programs with planted mistakes, and what the sanitizers call each."""


def sanitized(folder: Path, cc: list[str]) -> dict[str, str]:
    """Return the environment of processes that use a sanitized build."""
    # The runtime must be loaded before everything else, because Python itself is not linked to it.
    found = subprocess.run(
        [*cc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    runtime = Path(found)
    if not runtime.is_absolute():
        raise ToolFailed(f"{' '.join(cc)} has no libasan.so: install GCC's sanitizers, or choose a GCC with CC=gcc.")
    return environment(
        folder,
        [runtime],
        PYTHONMALLOC="malloc",  # Python's own allocator would hide the ends of its blocks
        # Python frees little at its end, so leaks would be its own.
        ASAN_OPTIONS=f"detect_leaks=0:exitcode={FOUND}:allocator_may_return_null=1",
        UBSAN_OPTIONS=f"halt_on_error=1:print_stacktrace=1:exitcode={FOUND}",
    )


def prove(folder: Path, cc: list[str], environ: dict[str, str]) -> None:
    """Check that the sanitizers find planted mistakes, and that the build is the one that is imported.

    Raises:
        ToolFailed: they do not, or it is not.
    """
    source = folder / "planted.c"
    source.write_text(PLANTED)
    compile_extension(source, folder / "planted.so", cc, FLAGS)
    for program, name in MISTAKES.items():
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
        )
        if ended.returncode != FOUND or name not in ended.stderr:
            raise ToolFailed(f"the sanitizers do not find a planted {name} here: {ended.stderr.strip()[-500:]}")
    program = "from loader_service.data import _jpeg, _kernel; print(_jpeg.__file__, _kernel.__file__)"
    ended = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    if ended.returncode or ended.stdout.count(str(folder)) != 2:
        raise ToolFailed(f"the sanitized build is not used: {ended.stdout}{ended.stderr.strip()[-500:]}")


def run(what: str, arguments: list[str], environ: dict[str, str]) -> None:
    """Run a Python program in an environment.

    Raises:
        ToolFailed: it failed.
    """
    click.echo(f"{what}: python {' '.join(arguments)}")
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, check=False).returncode
    if code:
        why = "a sanitizer found something" if code == FOUND else f"exit code {code}"
        raise ToolFailed(f"{what} failed ({why}); the output above has the place.")


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--quick", is_flag=True, help="A form of under two minutes: fewer tests and inputs.")
@click.option(
    "--inputs", type=click.IntRange(1), help=f"Number of damaged JPEGs.  [default: {INPUTS}, quick {QUICK_INPUTS}]"
)
@click.option("--seed", type=int, help="Seed of the damage.  [default: random, and printed]")
@click.option("--build", "folder", type=click.Path(path_type=Path), default=BUILD, help="Folder of the build; emptied.")
def main(quick: bool, inputs: int | None, seed: int | None, folder: Path) -> None:
    """Run the data tests and damaged JPEGs through sanitized extensions."""
    cc, seed = own_compiler(), secrets.randbits(32) if seed is None else seed
    build(folder, cc, FLAGS)
    environ = sanitized(folder, cc)
    prove(folder, cc, environ)
    click.echo("the sanitizers find planted mistakes here")
    tests = QUICK_TESTS if quick else TESTS
    # A test may take several times as long as usual; no cache, which would be that of the plain tests.
    options = ["-q", "-p", "no:cacheprovider", "--timeout", "600", "--numprocesses", "2", "--dist", "worksteal"]
    run("data tests", ["-m", "pytest", *options, *tests], environ)
    number = inputs or (QUICK_INPUTS if quick else INPUTS)
    run("damaged JPEGs", ["-m", "tools.fuzz", "--only", "jpegs", "--inputs", str(number), "--seed", str(seed)], environ)
    click.echo("no sanitizer found anything")


if __name__ == "__main__":
    main(prog_name="python -m tools.sanitize")
