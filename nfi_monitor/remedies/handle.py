"""Undo a remedy that has been applied."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Handle:
    """Undo a remedy with ``undo()``, or at the end of a ``with`` block.

    Handles may be undone in any order: each undoes its own remedy alone.
    """

    def __init__(self, what: str, undo: Callable[[], None]) -> None:
        self.what = what
        self._undo: Callable[[], None] | None = undo

    @property
    def active(self) -> bool:
        return self._undo is not None

    def undo(self) -> None:
        """Undo the remedy. Calling it again does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def remove(self) -> None:
        """Do the same as :meth:`undo`: torch's own handles (of hooks) have a method of this name."""
        self.undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<{self.what}{'' if self.active else ', undone'}>"
