"""Errors of the monitor itself: each is reported once, and the part that failed stays quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Faults:
    """``quiet`` holds the names of the parts that have failed.

    Args:
        report: ``report(part, error)``, called at the first error of each part. What it raises is dropped.
        heard: ``heard(part)``, called at every error.
    """

    def __init__(self, report: Callable[[str, BaseException], None], heard: Callable[[str], None]) -> None:
        self._report, self._heard = report, heard
        self.quiet: set[str] = set()

    def failed(self, part: str, error: BaseException) -> None:
        """Report an error once; the part is quiet from now on, training goes on."""
        self._heard(part)
        if part in self.quiet:
            return
        self.quiet.add(part)
        # Saying so may fail as well (a console that is gone): then there is nothing left to tell it to.
        with suppress(Exception):
            self._report(part, error)

    @contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """What runs in here must not stop a training: an exception is reported once, under this name."""
        try:
            yield
        except Exception as error:
            self.failed(part, error)
