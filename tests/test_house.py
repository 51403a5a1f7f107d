"""Test that code stays easy to enter.

Files and functions are short, imports have no circles, and no module uses private names of another module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nfi_monitor
from tests.test_layers import imported

PACKAGE = Path(nfi_monitor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINES, FUNCTION_LINES = 400, 60
REASON = "Longer than 400 lines because"
"""Beginning of the sentence with which a long file's docstring explains its length."""


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_a_file_is_short_or_says_why_it_is_not() -> None:
    long = {
        _name(path)
        for path, tree in _trees()
        if len(path.read_text(encoding="utf-8").splitlines()) > LINES
        and REASON not in (ast.get_docstring(tree) or "")
    }
    assert not long


def test_a_function_is_short() -> None:
    long = {
        f"{_name(path)}: {node.name} ({(node.end_lineno or 0) - node.lineno + 1})"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert not long


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> set[str]:
    """Return the private names of a module: functions, classes, variables, attributes of ``self``, slots."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _private(node.value):
            found.add(node.value)
    return {name for name in found if _private(name)}


def test_no_module_uses_a_private_part_of_another_one() -> None:
    defined = {path: _defined(tree) for path, tree in _trees()}
    wrong = set()
    for path, tree in _trees():
        others = set().union(*(names for other, names in defined.items() if other != path)) - defined[path]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in others:
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    wrong.add(f"{_name(path)}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nfi_monitor."):
                wrong |= {f"{_name(path)}: {alias.name}" for alias in node.names if _private(alias.name)}
    assert not wrong


def _graph() -> dict[str, set[str]]:
    """Return module → modules of the package that it imports anywhere, also for type hints."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for other in imported(path, hints=True):
            for known in (other, f"{other}.__init__"):
                if known in modules and known != name:
                    found.add(known)
        graph[name] = found
    return graph


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return sets of nodes that reach each other, by search from each node: the graph is small."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, left = set(), [start]
        while left:
            for other in graph[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        reach[start] = seen
    together = {tuple(sorted({a, *(b for b in reach[a] if a in reach[b])})) for a in graph if a in reach[a]}
    return [list(circle) for circle in sorted(together)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: others for name, others in _graph().items() if name != "__init__"}
    assert not _circles({name: others & graph.keys() for name, others in graph.items()})


@pytest.mark.parametrize("broken", [{"a": {"b"}, "b": {"c"}, "c": {"a"}}])
def test_a_circle_is_found(broken: dict[str, set[str]]) -> None:
    assert _circles(broken) == [["a", "b", "c"]]
