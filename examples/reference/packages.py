"""Packages that only the studies need: imported where they are used, asked for by name where missing."""

from __future__ import annotations

import importlib
from typing import Any

from examples.reference.results import StudyError


def require(module: str, purpose: str) -> Any:
    """The imported module. Raises StudyError with the line that installs it.

    ``purpose`` ends the sentence "X is needed for …".
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        name = missing.name or module
        raise StudyError(
            f'{name} is needed for {purpose} and not installed: pip install "nfi-monitor[examples]"'
        ) from missing
