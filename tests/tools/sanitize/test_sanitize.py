"""The sanitizers find planted mistakes in a build of their own, and the tool fails when they find something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loader_service.data import _jpeg
from tools.errors import ToolFailed
from tools.sanitize.__main__ import FLAGS, FOUND, prove, run, sanitized
from tools.sanitize.builds import SOURCES, build, compile_extension, own_compiler

CC = own_compiler()


def has_sanitizers() -> bool:
    """Return whether the compiler exists and has the address sanitizer's library."""
    try:
        found = subprocess.run([*CC, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return Path(found.strip()).is_absolute()


pytestmark = pytest.mark.skipif(not has_sanitizers(), reason="the compiler here has no address sanitizer")


@pytest.mark.long
def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    """An overflow of the heap and one of a sum end their process; the sanitized build is the one that is imported."""
    installed = Path(_jpeg.__file__)
    before = installed.stat()
    build(tmp_path / "build", CC, FLAGS)
    assert installed.stat() == before  # a build does not touch the installed extension
    environ = sanitized(tmp_path / "build", CC)
    prove(tmp_path / "build", CC, environ)
    with pytest.raises(ToolFailed, match=r"a test failed \(a sanitizer found something\)"):
        run("a test", ["-c", "import planted; planted.overflow(7)"], environ)
    code = subprocess.run([sys.executable, "-c", "import planted; planted.add(0)"], env=environ, check=False).returncode
    assert code == 0  # no mistake is made, and none is found


def test_a_build_without_sanitizers_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sanitizers' flags the planted mistakes pass, and the tool says so before it runs anything."""
    environ = sanitized(tmp_path, CC)
    monkeypatch.setattr("tools.sanitize.__main__.FLAGS", ())
    with pytest.raises(ToolFailed, match="do not find a planted"):
        prove(tmp_path, CC, environ)


def test_what_does_not_compile_is_named(tmp_path: Path) -> None:
    """The error has the compiler, the file and the compiler's reason."""
    (tmp_path / "_broken.c").write_text("int main(")
    with pytest.raises(ToolFailed, match=r"cannot compile _broken.c: (?s:.*)error"):
        compile_extension(tmp_path / "_broken.c", tmp_path / "_broken.so", CC)
    with pytest.raises(ToolFailed, match="no-such-compiler cannot be run"):
        compile_extension(SOURCES[0], tmp_path / "x.so", ["no-such-compiler"])
    assert FOUND not in (0, 1, 2)
