"""Name the extra to install, only where its package is missing."""

from __future__ import annotations

import importlib.util
from typing import NoReturn


def raise_missing(error: ImportError, packages: tuple[str, ...], advice: str) -> NoReturn:
    """Raise ImportError with ``advice`` if one of ``packages`` is not installed, else ``error`` itself.

    A package that is installed but fails to import (a broken torchvision, a wrong version) needs another
    remedy: its own message names that.
    """
    top = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top in packages and not _installed(top):
        raise ImportError(advice) from error
    raise error


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is being imported
        return True
