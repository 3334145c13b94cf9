"""The documents and the set-up, compared with the files, tests and packages that they name."""

from __future__ import annotations

import ast
import importlib.metadata
import json
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
PACKAGES = ("loader_service", "trainer", "tools")
EXTRAS_OF_MAKE = ("trainer", "report", "dev")
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "examples/README.md",
    *(f"docs/{p.relative_to(ROOT / 'docs')}" for p in sorted((ROOT / "docs").rglob("*.md"))),
)


def read(name: str) -> str:
    """Return the text of a file, named from the repository's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(document: str) -> str:
    """Return a Markdown document without its fenced blocks and inline code, which contain no links or headings."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL))


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return the `tests/file.py::test` references in a document as pairs of path and name."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def has_test(path: str, test: str) -> bool:
    """Return whether a file defines a function of that name, at its top or in a class."""
    if not (ROOT / path).exists():
        return False
    tree = ast.parse(read(path))
    return any(isinstance(node, ast.FunctionDef) and node.name == test for node in ast.walk(tree))


def anchors(document: str) -> set[str]:
    """Return the fragments by which links reach a document's headings, by GitHub's rule."""
    # Inline code keeps its text in an anchor, so only fenced blocks are removed here.
    text = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name: str) -> list[str]:
    """Return the relative links of a document whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(read(name))):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        path, _, fragment = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (fragment and fragment not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def test_every_guarantee_names_a_test() -> None:
    """Each section of the guarantees, and each row of the faults, names at least one test."""
    sections = re.split(r"^### ", read("docs/design/guarantees.md"), flags=re.MULTILINE)[1:]
    rows = [
        line for line in read("docs/design/faults.md").split("## Exit codes")[0].splitlines() if line.startswith("| ")
    ]
    assert len(sections) >= 20
    assert len(rows[1:]) >= 17
    assert [part.splitlines()[0] for part in [*sections, *rows[1:]] if not named_tests(part)] == []


def test_every_threat_names_a_test_or_is_not_defended() -> None:
    """Each line of the threat model names the tests that try it, or says that nothing defends it or tests it."""
    lines = [line for line in read("docs/design/threat-model.md").splitlines() if line.startswith("| ")]
    threats = [line for line in lines if not line.startswith("| what may happen")]
    assert len(threats) >= 35
    assert [line for line in threats if not named_tests(line) and not re.search("not (defended|tested)", line)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_named_in_a_document_exists(document: str) -> None:
    """Each `tests/file.py::test` in a document is a test of that file."""
    assert [f"{path}::{test}" for path, test in named_tests(read(document)) if not has_test(path, test)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_named_in_a_document_exists(document: str) -> None:
    """Each path of a Python file in a document's inline code is a file of this repository."""
    paths = re.findall(r"`((?:loader_service|trainer|tools|tests)/[\w/]+\.py)\b", read(document))
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_resolve(document: str) -> None:
    """Each relative link in a document leads to a file, and to a heading if it has a fragment."""
    assert broken_links(document) == []


def makefile_targets() -> set[str]:
    """Return every verb that the Makefile defines."""
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", read("Makefile"), re.MULTILINE))


def test_make_alone_explains_every_verb() -> None:
    """`make` without a verb lists each verb of the Makefile, and nothing else."""
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert set(re.findall(r"^make ([a-z-]+) +\S", shown, re.MULTILINE)) == makefile_targets()


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "docs/docker.md", ".ci/run"])
def test_documents_name_only_verbs_that_exist(document: str) -> None:
    """A `make verb` in a document is one of the Makefile's."""
    named = set(re.findall(r"(?:^|`| {4})make ([a-z-]+)", read(document), re.MULTILINE))
    assert named
    assert named <= makefile_targets()


def constraints() -> dict[str, Version]:
    """Return the pinned version of each distribution."""
    lines = [line.split("#")[0].strip() for line in read("constraints.txt").splitlines()]
    pins = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def declared(extra: str | None = None) -> list[Requirement]:
    """Return the requirements of pyproject.toml that apply to this machine: the basic ones, or those of an extra."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return applying(lines)


def applying(lines: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Return the requirements whose markers hold on this machine, with any of these extras."""
    needs = [Requirement(line) for line in lines]
    names = ("", *extras)
    return [need for need in needs if not need.marker or any(need.marker.evaluate({"extra": name}) for name in names)]


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Return the installed versions, without their local parts, of all direct and indirect requirements."""
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
    """Every distribution that the Makefile's .venv needs, directly or indirectly, has its version in constraints.txt."""
    pins = constraints()
    roots = declared() + [requirement for extra in EXTRAS_OF_MAKE for requirement in declared(extra)]
    found = closure(roots)
    assert len(found) > len(roots)
    assert {name: version for name, version in found.items() if str(pins.get(name)) != version} == {}


@pytest.mark.parametrize("extra", [None, "trainer", "report", "ray", "dev"])
def test_every_pin_is_one_that_the_project_accepts(extra: str | None) -> None:
    """Each requirement in pyproject.toml has a pin, and the pin lies in the required range."""
    pins = constraints()
    assert [str(need) for need in declared(extra) if pins[canonicalize_name(need.name)] not in need.specifier] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Pillow-SIMD needs x86-64; other machines use stock Pillow")
def test_pil_is_pillow_simd() -> None:
    """The imported PIL is Pillow-SIMD's, because stock Pillow resizes to other bytes."""
    assert PIL.__version__ == importlib.metadata.version("pillow-simd")
    assert re.search(r"\.post\d+$", PIL.__version__)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("pillow")


def folders(*names: str) -> list[Path]:
    """Every folder that holds Python files, below these."""
    return sorted({path.parent for name in names for path in (ROOT / name).rglob("*.py")})


def test_no_folder_is_too_large_to_take_in() -> None:
    """A folder's listing shows its architecture only while it is short: at most 16 Python files."""
    assert [str(folder.relative_to(ROOT)) for folder in folders(*PACKAGES) if len(list(folder.glob("*.py"))) > 16] == []


def test_docstrings_say_what_a_thing_does() -> None:
    """A summary begins with a verb or a noun, never with a question word."""
    question = re.compile(r"(What|Where|How|Who|When|Whether|Which)\b")
    wrong = [
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for path in sorted({file for folder in folders(*PACKAGES, "tests") for file in folder.glob("*.py")})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and question.match(docstring := ast.get_docstring(node) or "")
    ]
    assert wrong == []


def test_every_example_is_short_and_linked() -> None:
    """An example has at most 60 lines, the notebook's code, too; README and the folder's page link it."""
    files = [path for path in sorted((ROOT / "examples").iterdir()) if path.suffix in (".py", ".ipynb")]
    assert len(files) >= 9
    for path in files:
        text = read(f"examples/{path.name}")
        if path.suffix == ".ipynb":
            text = "".join(
                "".join(cell["source"]) + "\n" for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"
            )
        assert len(text.splitlines()) <= 60, path.name
        assert f"({path.name})" in read("examples/README.md")
        assert f"(examples/{path.name})" in read("README.md")
