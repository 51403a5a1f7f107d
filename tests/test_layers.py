"""Data flows one way, and so do imports: a room knows those that stand before it in the line, no others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nfi_monitor

PACKAGE = Path(nfi_monitor.__file__).parent
ROOMS = (
    "native", "capture", "measure", "detect", "ranks", "replay", "remedies", "report", "engine", "monitor",
    "cli",
)  # fmt: skip
"""From tensors to people. Modules at the top that are not named here know none of them."""
ALLOWED = {"capture/probe_batch.py imports measure.displacement"}  # keeps margins, not a batch of logits


def imported(path: Path, *, hints: bool = False) -> set[str]:
    """Modules of the package that a file imports, wherever in it; with ``hints`` also for hints alone."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if not hints and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nfi_monitor"):
            inner = node.module.removeprefix("nfi_monitor").removeprefix(".")
            folder = PACKAGE.joinpath(*inner.split("."))
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
                found.add(".".join(filter(None, (inner, alias.name))) if is_module or not inner else inner)
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("nfi_monitor.") for a in node.names if "nfi_monitor." in a.name)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]


def _wrong(files: list[Path], forbidden: tuple[str, ...]) -> set[str]:
    return {
        f"{path.relative_to(PACKAGE.parent).as_posix().removeprefix('nfi_monitor/')} imports {name}"
        for path in files
        for name in imported(path)
        if name.split(".")[0] in forbidden
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_none_that_comes_after_it(room: str) -> None:
    assert _wrong(_files(room), ROOMS[ROOMS.index(room) + 1 :]) <= ALLOWED


def test_every_package_is_a_room() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - set(ROOMS) == {"quantities"}  # which all rooms share


def test_what_all_rooms_share_knows_no_room() -> None:
    shared = [path for path in PACKAGE.glob("*.py") if path.stem not in (*ROOMS, "__init__", "__main__")]
    assert {"types", "history"} <= {path.stem for path in shared}
    shared += _files("quantities")
    assert not _wrong(shared, ROOMS)


def test_an_adapter_imports_faces_reports_and_what_all_rooms_share() -> None:
    adapters = sorted((PACKAGE.parent / "integrations").glob("*.py"))
    assert len(adapters) >= 4
    assert not _wrong(adapters, tuple(room for room in ROOMS if room not in ("monitor", "report")))


@pytest.mark.parametrize("room", ["detect", "report"])
def test_judging_and_reporting_need_no_torch(room: str) -> None:
    for path in _files(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] == "torch"}, path
