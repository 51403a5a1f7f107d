"""Find ``nfi_monitor.integrations`` and ``nfi_monitor.examples`` in a copy of the repository.

The adapters and the examples are at the top of the repository, where people look for them, and are installed
inside the package.  In a copy of the repository that is not installed, this module finds the folders of that
copy.  (Rejected: adding the top of the repository to the package's ``__path__``, because the package would
contain itself, and :func:`pkgutil.walk_packages` would not end.)
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NAMES = ("integrations", "examples")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, top: Path) -> None:
        self._top = top

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "nfi_monitor" or name not in NAMES:
            return None
        folder = self._top / name
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Find both folders in the repository, before installed ones, if the package is in a copy of it."""
    top = Path(__file__).resolve().parents[1]
    if all(
        (top / name).is_file()
        for name in ("pyproject.toml", "integrations/attach.py", "examples/__init__.py")
    ):
        sys.meta_path.insert(0, _Finder(top))
