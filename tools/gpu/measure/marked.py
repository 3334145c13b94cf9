"""The tests marked ``gpu``, run by pytest in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tools.errors import ToolFailed
from tools.gpu.parts import Settings
from tools.gpu.results import AnyRow, Marked
from tools.terminal import ROOT

MARK: Final = re.compile(r"\bmark\.gpu\b")
NO_TESTS: Final = 5
"""pytest's exit code if it found no test."""

FAILED: Final = 1
MESSAGE_CHARACTERS: Final = 200


def marked_files(folder: Path) -> list[Path]:
    """Return the test files that use the mark; others may need packages that a GPU machine lacks."""
    return sorted(path for path in folder.rglob("test_*.py") if MARK.search(path.read_text(encoding="utf-8")))


def run(settings: Settings, _piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Run the tests; a failed test is a figure, not an error.

    Raises:
        ToolFailed: pytest could not run them.
    """
    files = marked_files(ROOT / "tests")
    if not files:
        emit(Marked("pytest", "no test is marked `gpu`"))
        return
    report = settings.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Warnings of another PyTorch than the one that is tested everywhere else are no failures.
    command += ["-W", "default", *(str(path.relative_to(ROOT)) for path in files)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stderr.write(done.stdout)
    if done.returncode not in (0, FAILED, NO_TESTS) or not report.exists():
        last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise ToolFailed(f"pytest ended with exit code {done.returncode}: {last.strip(' =.')}.")
    emit(read(report))


def read(report: Path) -> Marked:
    """Read pytest's JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314 -- pytest has just written it
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {(found.get('message') or '')[:MESSAGE_CHARACTERS]}"
        for case in cases
        for kind in ("failure", "error")
        if (found := case.find(kind)) is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Marked("pytest", "", len(cases) - len(failures) - skipped, len(failures), skipped, failures)
