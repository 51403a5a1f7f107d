"""Resolve every cross reference in a docstring: ``:mod:``, ``:class:``, ``:func:``, ``:meth:``, ``:attr:``
…"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nfi_monitor
from nfi_monitor import _moved

TOP = Path(nfi_monitor.__file__).parents[1]
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):`~?([\w.]+)`")
OPTIONAL = ("integrations/accelerate.py", "integrations/lightning.py", "integrations/transformers.py")
"""Adapters whose framework need not be installed here: only their names of this package are resolved."""


def _references() -> Iterator[tuple[str, str, str | None, str]]:
    """Yield (file, module, enclosing class, target) of every reference in a string of the package."""
    for folder in ("nfi_monitor", "integrations"):
        for path in sorted((TOP / folder).rglob("*.py")):
            file = str(path.relative_to(TOP))
            module = ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            owner = {
                id(inner): node.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for target in ROLE.findall(node.value):
                        yield file, module, owner.get(id(node)), target


def _has(start: object, path: str) -> bool:
    """Return whether ``path`` leads from an object, through its attributes, to something."""
    for name in filter(None, path.split(".")):
        if isinstance(start, ModuleType) and not hasattr(start, name):
            try:
                start = importlib.import_module(f"{start.__name__}.{name}")
                continue
            except ImportError:
                return False
        declared = name in getattr(start, "__annotations__", {}) or name in getattr(start, "__slots__", ())
        if not hasattr(start, name):
            return declared
        start = getattr(start, name)
    return True


def _resolves(module: str, owner: str | None, target: str) -> bool:
    if any(target == old or target.startswith(f"{old}.") for old in _moved.MOVED):
        return False
    here = importlib.import_module(module)
    if target.startswith("."):
        return _has(importlib.import_module(here.__package__ or module), target[1:])
    if _has(here, target) or (owner is not None and _has(getattr(here, owner, None), target)):
        return True
    first, _, rest = target.partition(".")
    try:
        return _has(importlib.import_module(first), rest)
    except ImportError:
        return False


def test_every_reference_names_something() -> None:
    broken = {
        f"{file}: {target}"
        for file, module, owner, target in _references()
        if (file not in OPTIONAL or target.startswith("nfi_monitor"))
        and not _resolves("nfi_monitor" if file in OPTIONAL else module, owner, target)
    }
    assert not broken
