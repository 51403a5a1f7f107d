"""Data flows one way, and so do imports: what stands earlier in the line does not know the rest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nfi_monitor

PACKAGE = Path(nfi_monitor.__file__).parent
STAGES = ("capture", "measure", "detect", "report")
MEASURES_AS_IT_CAPTURES = "probe_batch.py imports measure.displacement"  # keeps margins, not its logits
RANKS = ("distributed", "pool", "leaver", "ranks", "monitor")
"""Who trains together, what is said of a step, who answers for a closed monitor, who is read with whom."""


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it; for type hints alone do not count."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nfi_monitor"):
            inner = node.module.removeprefix("nfi_monitor").removeprefix(".")
            found.update({inner} if inner else {alias.name for alias in node.names})
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("nfi_monitor.") for a in node.names if "nfi_monitor." in a.name)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_none_that_comes_after_it(stage: str) -> None:
    later = STAGES[STAGES.index(stage) + 1 :]
    files = list((PACKAGE / stage).glob("*.py"))
    assert len(files) > 5
    wrong = {
        f"{path.name} imports {name}"
        for path in files
        for name in imported(path)
        if name.split(".")[0] in (*later, "monitor")
    }
    assert wrong <= {MEASURES_AS_IT_CAPTURES}


def test_what_many_processes_need_is_a_line_from_the_ranks_to_the_monitor() -> None:
    for place, name in enumerate(RANKS):
        known = imported(PACKAGE / f"{name}.py")
        assert not known & set(RANKS[place:]), name
        assert place == 0 or known & set(RANKS[:place]), f"{name} stands in the line for no reason"


def test_no_part_of_a_monitor_knows_the_monitor() -> None:
    parts = {path.split(".")[0] for path in imported(PACKAGE / "monitor.py")} - set(STAGES)
    assert parts >= {"ranks", "meter", "losses", "cadence", "notes", "history"}
    # replay is asked by a monitor, and pauses those that are open on the model.
    knows = {name for name in parts if "monitor" in imported(PACKAGE / f"{name}.py")}
    assert knows <= {"replay"}
