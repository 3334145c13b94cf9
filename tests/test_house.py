"""What the documents and the set-up say, compared with what is there."""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import re
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

import PIL
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS_OF_MAKE = ("trainer", "dev")


def read(name: str) -> str:
    """A file of the repository's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(document: str, heading: str) -> str:
    """The text below a second-level heading, up to the next one."""
    return document.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def named_tests(text: str) -> list[tuple[str, str]]:
    """The `tests/file.py::test` references in a document."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def test_every_promise_names_tests_that_exist() -> None:
    """Each row of the promises names at least one test, and each test it names is there."""
    promises = section(read("docs/design/guarantees.md"), "The promises")
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 7
    assert [row for row in rows if not named_tests(row)] == []
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "design").glob("*.md")))
    assert [f"{path}::{test}" for path, test in named_tests(pages) if not has_test(path, test)] == []


def has_test(path: str, test: str) -> bool:
    """Whether a file defines a function of that name, at its top or in a class."""
    if not (ROOT / path).exists():
        return False
    tree = ast.parse(read(path))
    return any(isinstance(node, ast.FunctionDef) and node.name == test for node in ast.walk(tree))


def makefile_targets() -> set[str]:
    """Every verb that the Makefile defines."""
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", read("Makefile"), re.MULTILINE))


def test_make_alone_explains_every_verb() -> None:
    """`make` without a verb lists each verb of the Makefile, and nothing else."""
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert set(re.findall(r"^make ([a-z-]+) +\S", shown, re.MULTILINE)) == makefile_targets()


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", ".ci/run"])
def test_documents_name_only_verbs_that_exist(document: str) -> None:
    """A `make verb` in a document is one of the Makefile's."""
    named = set(re.findall(r"(?:^|`| {4})make ([a-z-]+)", read(document), re.MULTILINE))
    assert named
    assert named <= makefile_targets()


def constraints() -> dict[str, Version]:
    """The pinned version of each distribution."""
    lines = [line.split("#")[0].strip() for line in read("constraints.txt").splitlines()]
    pins = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def declared(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml asks for on this machine: always, or with an extra."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return applying(lines)


def applying(lines: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements whose markers hold on this machine, with any of these extras."""
    needs = [Requirement(line) for line in lines]
    names = ("", *extras)
    return [need for need in needs if not need.marker or any(need.marker.evaluate({"extra": name}) for name in names)]


def closure(roots: list[Requirement]) -> dict[str, str]:
    """The installed version, less its local part, of all that these requirements lead to."""
    waiting, found = list(roots), dict[str, str]()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name not in found:
            distribution = importlib.metadata.distribution(name)
            found[name] = Version(distribution.version).public
            waiting += applying(distribution.requires or (), need.extras)
    return found


def test_what_is_installed_is_what_is_pinned() -> None:
    """Every distribution that the Makefile's .venv needs, direct or indirect, has its version in constraints.txt."""
    pins = constraints()
    roots = declared() + [requirement for extra in EXTRAS_OF_MAKE for requirement in declared(extra)]
    found = closure(roots)
    assert len(found) > len(roots)
    assert {name: version for name, version in found.items() if str(pins.get(name)) != version} == {}


@pytest.mark.parametrize("extra", [None, "trainer", "ray", "dev"])
def test_every_pin_is_one_that_the_project_accepts(extra: str | None) -> None:
    """Each requirement in pyproject.toml has a pin, and the pin lies in the range it gives."""
    pins = constraints()
    assert [str(need) for need in declared(extra) if pins[canonicalize_name(need.name)] not in need.specifier] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Pillow-SIMD is for x86-64; elsewhere stock Pillow is right")
def test_pil_is_pillow_simd() -> None:
    """Stock Pillow resizes to other bytes, so the PIL that is imported must be Pillow-SIMD's and nobody else's."""
    assert PIL.__version__ == importlib.metadata.version("pillow-simd")
    assert re.search(r"\.post\d+$", PIL.__version__)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("pillow")
