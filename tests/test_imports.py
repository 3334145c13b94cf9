"""The rules of imports and of forbidden calls, checked on the syntax tree of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("loader_service", "trainer", "tools")

# First-party imports: the longest prefix that names a module decides what it may import.
MAY_IMPORT = {
    "loader_service": ("loader_service",),
    "loader_service.errors": (),
    "loader_service.types": ("loader_service.errors",),
    "loader_service.metrics": ("loader_service.errors", "loader_service.types", "loader_service.wire"),
    "loader_service.data": ("loader_service.errors", "loader_service.types", "loader_service.data"),
    "loader_service.wire": ("loader_service.errors", "loader_service.types", "loader_service.wire"),
    "loader_service.client.protocol": (
        "loader_service.errors",
        "loader_service.types",
        "loader_service.defaults",
        "loader_service.client.plan",
        "loader_service.wire.messages",
    ),
    "loader_service.datasets": (
        "loader_service.errors",
        "loader_service.types",
        "loader_service.defaults",
        "loader_service.data",
        "loader_service.datasets",
    ),
    "trainer": ("trainer",),
    # The feed meets the service; a run's accounts are the loader's own.
    "trainer.data.feed": ("trainer", "loader_service"),
    "trainer.data.samples": ("trainer", "loader_service"),
    "trainer.run": ("trainer", "loader_service.types"),
    "trainer.report": ("trainer", "loader_service.types"),
    "tools": PACKAGES,
    "tools.environment": (),
    # These run before anything is installed.
    "tools.gpu.prepare": (),
    "tools.gpu.wheels": ("tools.gpu.prepare",),
    "tools.gpu.__main__": ("tools.gpu.prepare",),
}

# Third-party imports that only these may make.
ONLY_IN = {
    "lmdb": ("loader_service.data", "loader_service.datasets", "tools"),
    "zmq": ("loader_service.wire", "loader_service.node", "loader_service.client", "tools"),
    "torch": ("trainer", "loader_service.torch", "tools"),
}

# Plain state machines: an event and the time come in, actions go out.
PURE = (
    "loader_service.client.plan",
    "loader_service.client.protocol",
    "loader_service.node.scheduler",
)
IMPURE_IMPORTS = ("asyncio", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time", "zmq")

# Where pixels and the wire meet: who writes a slice's arrays, and who hands them out.
KNOW_DATA_AND_WIRE = {"loader_service.node.worker", "loader_service.client.loader"}

EXECUTES_WHAT_IT_READS = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
ONLY_NAMES = ("pickle.UnpicklingError",)  # what torch.load raises when it refuses a file


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every first-party module, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def under(name: str, prefix: str) -> bool:
    """Return whether a module is ``prefix`` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")


def imported(module: str, node: ast.AST) -> list[str]:
    """Return the modules that an import statement names: `from a import b` is a.b if that is a module, else a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here"
    assert node.module is not None
    whole = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules() else node.module for name in whole]


def imports(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported name below ``tree``, with its line."""
    for node in ast.walk(tree):
        for name in imported(module, node):
            yield name, getattr(node, "lineno", 0)


def first_party(name: str) -> bool:
    """Return whether an imported name belongs to this project."""
    return name.split(".")[0] in PACKAGES


def renamed(node: ast.AST) -> list[str]:
    """Return the full names behind the short names of an import: a.b of `from a import b`, a.b of `import a as b`."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return (
        [f"{alias.name}.{alias.asname}" for alias in node.names if alias.asname] if isinstance(node, ast.Import) else []
    )


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call below ``tree`` whose callee is a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every function below ``tree``."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def test_each_part_imports_only_what_it_may() -> None:
    """The longest prefix in MAY_IMPORT holds for every first-party import."""
    wrong = []
    for module, tree in modules().items():
        allowed = MAY_IMPORT[max((prefix for prefix in MAY_IMPORT if under(module, prefix)), key=len)]
        wrong += [
            f"{module}, line {line}, imports {name}"
            for name, line in imports(module, tree)
            if first_party(name) and not any(under(name, prefix) for prefix in allowed)
        ]
    assert wrong == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_third_party_package_stays_where_it_belongs(package: str) -> None:
    """Only the packages in ONLY_IN import sockets, databases and tensors."""
    wrong = [
        f"{module}, line {line}"
        for module, tree in modules().items()
        for name, line in imports(module, tree)
        if under(name, package) and not any(under(module, home) for home in ONLY_IN[package])
    ]
    assert wrong == []


def test_data_and_wire_meet_in_two_places_alone() -> None:
    """Only the modules in KNOW_DATA_AND_WIRE import both data and wire."""
    both = {
        module
        for module, tree in modules().items()
        if under(module, "loader_service")
        and all(
            any(under(name, f"loader_service.{part}") for name, _ in imports(module, tree)) for part in ("data", "wire")
        )
    }
    assert both <= KNOW_DATA_AND_WIRE
    assert "loader_service.node.worker" in both


def test_the_state_machines_are_pure() -> None:
    """A state machine imports no socket, clock, thread or process, so its tests need none."""
    wrong = [
        f"{module} imports {name}"
        for module in PURE
        for name, _ in imports(module, modules()[module])
        if any(under(name, impure) for impure in IMPURE_IMPORTS)
    ]
    assert wrong == []


def test_no_first_party_import_hides_in_a_function() -> None:
    """First-party imports stand at the top of a file: a deferred one would hide a cycle."""
    wrong = [
        f"{module}, line {line}, imports {name}"
        for module, tree in modules().items()
        for function in functions(tree)
        for name, line in imports(module, function)
        if first_party(name)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The imports have no cycle: modules without unresolved imports can be removed until none is left."""
    waiting = {
        module: {name for name, _ in imports(module, tree) if name in modules() and name != module}
        for module, tree in modules().items()
    }
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert waiting == {}


def test_nothing_is_read_by_executing_it() -> None:
    """No module uses pickle, eval or exec, and torch.load reads weights only."""
    wrong = []
    for module, tree in modules().items():
        wrong += [
            f"{module}, line {getattr(node, 'lineno', 0)}, uses {name}"
            for node in ast.walk(tree)
            for name in [ast.unparse(node)] * isinstance(node, ast.Attribute) + renamed(node)
            if name.split(".")[0] in EXECUTES_WHAT_IT_READS and name not in ONLY_NAMES
        ]
        for callee, call in calls(tree):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            unsafe_load = callee == "torch.load" and keywords.get("weights_only") != "True"
            if callee in ("eval", "exec") or unsafe_load or keywords.get("allow_pickle") == "True":
                wrong.append(f"{module}, line {call.lineno}, calls {callee}")
    assert wrong == []


def test_nobody_sleeps_to_poll() -> None:
    """No module calls sleep: it waits on a socket, a queue or a condition instead."""
    wrong = [
        f"{module}, line {call.lineno}"
        for module, tree in modules().items()
        for callee, call in calls(tree)
        if callee.split(".")[-1] == "sleep"
    ]
    assert wrong == []


def test_seeds_are_never_added() -> None:
    """No module adds to a seed: `seed + epoch` would make (0, 1) the same stream as (1, 0)."""

    def is_seed(node: ast.AST) -> bool:
        name = getattr(node, "id", getattr(node, "attr", ""))
        return str(name).lower().endswith("seed")

    wrong = [
        f"{module}, line {node.lineno}: {ast.unparse(node)}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (is_seed(node.left) or is_seed(node.right))
    ]
    assert wrong == []


def test_no_error_is_dropped_in_silence() -> None:
    """No module catches all exceptions and ignores them."""
    wrong = [
        f"{module}, line {node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
    ]
    assert wrong == []


@pytest.mark.parametrize("entry", ["loader_service", "loader_service.cli"])
def test_a_loader_machine_needs_no_torch(entry: str) -> None:
    """A node and a client run without importing torch."""
    program = f"import sys, {entry}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_no_tool_imports_another_tools_entry() -> None:
    """A ``__main__`` and the demo are commands; code that two tools share has a module of its own."""
    wrong = [
        f"{module}, line {line}, imports {name}"
        for module, tree in modules().items()
        for name, line in imports(module, tree)
        if name.endswith(".__main__") or under(name, "tools.demo")
    ]
    assert wrong == []
