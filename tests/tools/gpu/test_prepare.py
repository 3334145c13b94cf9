"""A Python without this project's packages: what is installed, compiled and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import prepare
from tools.gpu.wheels import command

ROOT = Path(__file__).parents[3]


def test_torch_is_the_machines_own() -> None:
    """Everything else that the project, its trainer and the tests on a GPU need is wanted; Pillow without SIMD."""
    wanted = prepare.requirements()
    assert {"numpy", "pyzmq", "lmdb", "tensorboardx", "pillow", "pytest", "psutil"} <= set(wanted)
    assert not {"torch", "pillow-simd", "mypy"} & set(wanted)
    assert wanted["pyzmq"] == (26, 4)
    assert prepare.missing(wanted, prepare.versions()) == []


def test_only_what_is_absent_or_too_old_is_installed(tmp_path: Path) -> None:
    """The machine's own packages stay in use: its torch was built with them."""
    for name in ("numpy-2.4.6-cp312-x.whl", "lmdb-3.0.0-cp312-x.whl", "markdown_it_py-4.3.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    have = {"numpy": (2, 5, 2), "lmdb": (1, 3)}
    chosen = prepare.needed_wheels(tmp_path, {"numpy": (1, 26), "lmdb": (1, 4)}, have)
    assert [path.name.partition("-")[0] for path in chosen] == ["lmdb", "markdown_it_py"]


@pytest.mark.parametrize(
    ("have", "said"),
    [({}, "has no PyTorch"), ({"torch": (2, 3, 1)}, "PyTorch 2.3.1 is too old"), ({"torch": (2, 11, 0)}, "")],
)
def test_an_old_or_absent_torch_is_refused(have: dict[str, tuple[int, ...]], said: str) -> None:
    """2.4 is the oldest."""
    assert said in prepare.check_torch(have)
    assert bool(prepare.check_torch(have)) == bool(said)


def test_an_old_python_is_refused() -> None:
    """The sentence says what is needed."""
    assert prepare.check_python((3, 12)) == ""
    assert "this Python is 3.10, but 3.11 to 3.13 is needed" in prepare.check_python((3, 10))


def test_a_version_is_read_up_to_its_first_word() -> None:
    """Local builds and release candidates count as their numbers."""
    assert prepare.numbers("2.11.0+cu130") == (2, 11, 0)
    assert prepare.numbers("12.1.1.post0") == (12, 1, 1)


def test_the_extensions_are_compiled_where_they_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target is a module that this Python loads; without a compiler the command goes on."""
    built = [(tmp_path / target.name, arguments, inputs) for target, arguments, inputs in prepare.extensions()]
    assert {path.name.partition(".")[0] for path, _, _ in built} == {"_kernel", "_jpeg"}
    monkeypatch.setattr(prepare, "extensions", lambda: iter(built))
    monkeypatch.setenv("CC", "/nowhere/cc")
    prepare.compile_extensions()
    assert not any(path.exists() for path, _, _ in built)
    monkeypatch.delenv("CC")
    prepare.compile_extensions()
    assert all(path.exists() for path, _, _ in built)
    program = "import _kernel, _jpeg; print('loaded')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "loaded\n"


def test_a_folder_of_wheels_that_is_absent_is_refused(tmp_path: Path) -> None:
    """One sentence that names the command which makes it."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu", "--wheels", str(tmp_path / "absent")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert "is no folder; make one: `make gpu-wheels PYTHON_VERSION=3." in sentence


def test_wheels_are_pinned_and_for_the_other_machine() -> None:
    """Binary packages alone, for another Python and processor, in the versions of constraints.txt."""
    words = command(Path("wheels"), "3.12", "aarch64")
    assert words[words.index("--python-version") + 1] == "3.12"
    assert "manylinux_2_28_aarch64" in words
    assert "--only-binary=:all:" in words
    assert str(ROOT / "constraints.txt") in words
