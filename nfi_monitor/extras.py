"""Name the extra to install, only where its package is missing."""

from __future__ import annotations

from typing import NoReturn


def raise_missing(error: ImportError, packages: tuple[str, ...], advice: str) -> NoReturn:
    """Raise ImportError with ``advice`` if one of ``packages`` is not installed, else ``error`` itself.

    A package that is installed but fails to import (a broken torchvision, a wrong version) needs another
    remedy: its own message names that.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in packages:
        raise ImportError(advice) from error
    raise error
