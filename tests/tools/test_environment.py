"""The set-up: its choice of compiler and Python, and its messages about missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment

ROOT = Path(__file__).parent.parent.parent
AVX2 = "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2\n"


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find_python(path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run find-python.sh in an empty folder, with a PATH of this folder alone."""
    command = ["/bin/sh", str(ROOT / "tools" / "find-python.sh")]
    environ = {"PATH": str(path), **variables}
    return subprocess.run(command, cwd=path, env=environ, capture_output=True, text=True, check=False, timeout=30)


def test_avx2_is_used_where_the_processor_has_it() -> None:
    """The compiler's flag follows the flags in /proc/cpuinfo, not a word elsewhere in the file."""
    assert environment.compiler_for_simd("cc", AVX2) == "cc -mavx2"
    assert environment.compiler_for_simd("cc", AVX2.replace(" avx2", "")) == "cc"
    assert environment.compiler_for_simd("cc", "model name\t: avx2 machine\nflags\t\t: fpu\n") == "cc"


def test_the_compiler_is_the_users_choice_first() -> None:
    """$CC is used first, with its arguments."""
    assert environment.compiler({"CC": "ccache gcc"}) == "ccache gcc"


def test_a_missing_compiler_is_found_before_it_is_needed() -> None:
    """Without a working compiler no header can be checked, so the compiler alone is named."""
    assert environment.missing_prerequisites("/nonexistent/cc") == ["a working C compiler"]


def test_a_missing_header_is_named(tmp_path: Path) -> None:
    """If the compiler does not find jpeglib.h, libjpeg's headers are named and nothing else."""
    cc = script(tmp_path / "cc", "if grep -q jpeglib.h; then exit 1; fi")
    assert environment.missing_prerequisites(str(cc)) == ["libjpeg's headers"]


def test_the_remedy_is_a_command_to_copy() -> None:
    """The message lists what is missing and each package manager's packages for it."""
    text = environment.remedy(["Python's headers", "zlib's headers"], ["apt-get", "apk"])
    assert "lacks Python's headers, zlib's headers" in text
    assert "sudo apt-get install python3-dev zlib1g-dev" in text
    assert "sudo apk add python3-dev zlib-dev" in text


def test_every_package_manager_has_a_package_for_every_prerequisite() -> None:
    """Every prerequisite has packages for each package manager."""
    for _, packages in environment.PREREQUISITES.values():
        assert packages.keys() == environment.INSTALL_COMMANDS.keys()


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3"])
def test_any_name_that_fits_is_found(tmp_path: Path, name: str) -> None:
    """Each usual name of a Python is tried."""
    (tmp_path / name).symlink_to(sys.executable)
    assert find_python(tmp_path).stdout == f"{name}\n"


def test_a_python_that_does_not_run_is_skipped(tmp_path: Path) -> None:
    """A shim that only prints an error is skipped."""
    script(tmp_path / "python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    (tmp_path / "python3.12").symlink_to(sys.executable)
    assert find_python(tmp_path).stdout == "python3.12\n"


def test_no_python_is_one_sentence(tmp_path: Path) -> None:
    """Without a suitable Python on PATH, the exit code is 1 and the message says what to install."""
    done = find_python(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no Python 3.11, 3.12 or 3.13" in done.stderr


def test_a_chosen_python_must_be_suitable(tmp_path: Path) -> None:
    """PYTHON is used if it is suitable, and never silently replaced by another."""
    assert find_python(tmp_path, PYTHON=sys.executable).stdout == f"{sys.executable}\n"
    old = script(tmp_path / "python2.7", "exit 1")
    (tmp_path / "python3.11").symlink_to(sys.executable)
    done = find_python(tmp_path, PYTHON=str(old))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"PYTHON={old} cannot be used" in done.stderr


def test_an_environment_that_is_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set-up never empties another folder's environment through a link."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    link = tmp_path / ".venv"
    link.symlink_to(other)
    monkeypatch.setattr(environment, "VENV", link)
    monkeypatch.setattr(environment, "LOG", tmp_path / "build" / "setup.log")
    with pytest.raises(SystemExit):
        environment.run("dev")
    assert f".venv is a link to {other}" in capsys.readouterr().err
    assert (other / "kept").exists()


def test_a_finished_environment_costs_no_time_and_no_change(tmp_path: Path) -> None:
    """While the recorded inputs of .venv hold, the set-up prints nothing and changes nothing."""
    made = environment.made_from()
    # Otherwise the set-up would install, or clear a .venv that is a link to another checkout's.
    if environment.VENV.is_symlink() or not made or made != environment.recipe(made["extras"]):
        pytest.skip("make did not make this .venv, or its inputs have changed since")
    before = environment.READY.stat().st_mtime_ns
    extras = made["extras"]
    command = [str(ROOT / ".venv/bin/python"), str(ROOT / "tools/environment.py"), "--extras", extras]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True, timeout=30)
    assert (done.stdout, environment.READY.stat().st_mtime_ns) == ("", before)
