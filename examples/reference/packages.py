"""Import packages that only the studies need, where they are used; name a missing one in the error."""

from __future__ import annotations

import importlib
from typing import Any

from examples.reference.results import StudyError


def require(module: str, purpose: str) -> Any:
    """Import and return the module. Raises StudyError with the command that installs it.

    ``purpose`` ends the sentence "X is needed for …".
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        name = missing.name or module
        raise StudyError(
            f'{name} is needed for {purpose} and not installed: pip install "nfi-monitor[examples]"'
        ) from missing
