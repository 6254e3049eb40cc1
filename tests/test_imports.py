"""The shape of the package: acyclic, and light where it must be light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from io import StringIO
from pathlib import Path

import pytest

import twist_fl

PACKAGE = Path(twist_fl.__file__).parent
MODULES = {
    ".".join(("twist_fl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "app" not in path.relative_to(PACKAGE).parts
}
ROOMS = [
    *("system", "blueprint", "config", "data", "model", "training", "rounds", "tickets", "runs", "pruning"),
    *("federation", "report", "experiments", "cli"),
]
"""Each imports only from those before it."""
REFUSED = {
    "report": {"training", "model", "data", "federation", "pruning", "rounds", "tickets"},
    "pruning": {"runs", "rounds"},
    "experiments": {"federation"},
}
"""Rooms before it that a room has no business with."""
LIGHT = sorted(name for name in MODULES if name.split(".")[1:2] in (["blueprint"], ["config"]))
CORE = sorted(
    name
    for name in MODULES
    if name.count(".") and name.split(".")[1] in ROOMS[: ROOMS.index("federation")] and name not in LIGHT
)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child):
            yield child
            yield from _nodes(child)


@cache
def imports(path: Path) -> set[str]:
    """Modules that the file imports anywhere at run time, inside functions too."""
    found = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def depends_on(module: str) -> set[str]:
    """The package's modules that `module` imports, with their own, and so on."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(MODULES[waiting.pop()]) & MODULES.keys() - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def room(module: str) -> str:
    return module.split(".")[1]


def test_rooms_import_only_from_those_before_them() -> None:
    for name in MODULES.keys() - {"twist_fl", "twist_fl.__main__"}:
        allowed = set(ROOMS[: ROOMS.index(room(name)) + 1]) - REFUSED.get(room(name), set())
        for found in imports(MODULES[name]) & MODULES.keys() - {"twist_fl"}:
            assert room(found) in allowed, f"{name} imports {found}"


def test_imports_are_acyclic() -> None:
    graph = {name: imports(path) & MODULES.keys() - {name, "twist_fl"} for name, path in MODULES.items()}
    assert any(graph.values())
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [*LIGHT, *CORE])
def test_the_core_does_not_import_flower(module: str) -> None:
    for name in {module, *depends_on(module)}:
        assert not any(found.split(".")[0] == "flwr" for found in imports(MODULES[name])), name


def run_fresh(code: str) -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_config_blocks_blueprint_and_cost_do_not_load_torch_or_flower() -> None:
    run_fresh(f"import sys, {', '.join(LIGHT)}\nassert not {{'torch', 'flwr', 'transformers'}} & sys.modules.keys()")


def test_a_run_is_looked_at_without_torch_or_flower() -> None:
    run_fresh("import sys, twist_fl.runs.status\nassert not {'torch', 'flwr', 'transformers'} & sys.modules.keys()")


def test_the_core_runs_where_flower_is_not_installed() -> None:
    run_fresh(f"import sys\nsys.modules['flwr'] = None\nimport {', '.join([*LIGHT, *CORE])}")


def test_the_shipped_model_file_needs_torch_and_transformers_only() -> None:
    found = {name.split(".")[0] for name in imports(MODULES["twist_fl.model.modeling_subnet"])}
    assert "transformers" in found
    assert found - sys.stdlib_module_names <= {"torch", "transformers"}


def test_the_package_itself_only_says_where_its_names_are() -> None:
    assert imports(PACKAGE / "__init__.py") <= {
        "importlib",
        "importlib.import_module",
        "typing",
        "typing.Any",
        "typing.TYPE_CHECKING",
    }


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    found = set[int]()
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING):
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def test_no_file_is_long_and_the_core_is_small() -> None:
    long = {name for name, path in MODULES.items() if len(path.read_text(encoding="utf-8").splitlines()) > 300}
    assert not long
    core = [name for name in MODULES if name.count(".") and room(name) in ("blueprint", "model", "training", "rounds")]
    assert "twist_fl.rounds" in core
    assert 2_000 < sum(lines_of_code(MODULES[name]) for name in core) < 3_000
