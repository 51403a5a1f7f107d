"""Handle errors of the monitor itself: report each once, and switch off the part that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Faults:
    """Keep ``failed_parts``, the names of the parts that have failed and are switched off.

    Args:
        report: ``report(part, error)``, called at the first error of each part. Its own errors are ignored.
        on_error: ``on_error(part)``, called at every error.
    """

    def __init__(self, report: Callable[[str, BaseException], None], on_error: Callable[[str], None]) -> None:
        self._report, self._on_error = report, on_error
        self.failed_parts: set[str] = set()

    def failed(self, part: str, error: BaseException) -> None:
        """Report an error once, and mark the part as failed."""
        self._on_error(part)
        if part in self.failed_parts:
            return
        self.failed_parts.add(part)
        # The report itself may fail (a closed console). Then there is no other place to report to.
        with suppress(Exception):
            self._report(part, error)

    @contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """Run a block that must not stop the training: report an exception once, as an error of ``part``."""
        try:
            yield
        except Exception as error:
            self.failed(part, error)
