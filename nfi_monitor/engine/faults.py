"""Handle errors of the monitor itself: report each part's first error, and try the part again later.

One odd event (a pass of foreign tensors, memory that was short once) costs one reading.  Only a part that
fails again and again is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nfi_monitor.signal_handlers import raised_by_signal_handler

SWITCHED = frozenset({"rows", "optimizer", "probe", "snapshots", "detector", "on_alert"})
"""Parts that rest after an error. All others are tried at each occasion, however often they fail."""
TRIES = 6
"""Failures in a row, at readings that are 1, 2, 4 … readings apart, after which a part is switched off."""
RECOVERED = 8
"""Readings without a failure after which the failures before are no longer counted."""


@dataclass
class _Rest:
    """The last failures of one part."""

    failures: int = 0  # in a row
    last: int = -1  # reading of the last failure
    until: float = 0.0  # first reading that tries the part again


class Faults:
    """Know which parts of the monitor have failed, and which of them rest.

    Args:
        report: ``report(part, error, off)``, called at the first error of each part, and with ``off=True``
            when it is switched off for the rest of the run. Its own errors are ignored.
        on_error: ``on_error(part)``, called at every error.

    Attributes:
        failed_parts: names of the parts that have failed so far.
    """

    def __init__(
        self, report: Callable[[str, BaseException, bool], None], on_error: Callable[[str], None]
    ) -> None:
        self._report, self._on_error = report, on_error
        self._rests: dict[str, _Rest] = {}
        self._missed: set[str] = set()
        self._reading = 0
        self.failed_parts: set[str] = set()

    def next_reading(self) -> None:
        """Count a reading: the time in which parts rest."""
        self._reading += 1

    def is_off(self, part: str) -> bool:
        """Return whether a part that failed must not be run in this reading."""
        rest = self._rests.get(part)
        return rest is not None and self._reading < rest.until

    def failed(self, part: str, error: BaseException) -> None:
        """Record an error of a part: the part rests, first for this reading, then longer each time.

        Raises ``error`` again if the user's handler of a signal raised it, anywhere in the monitor.
        """
        if raised_by_signal_handler(error):
            raise error
        self._on_error(part)
        rest = self._rests.setdefault(part, _Rest())
        if rest.last == self._reading:
            return
        if self._reading - rest.until >= RECOVERED:
            rest.failures = 0
        rest.failures += 1
        rest.last = self._reading
        off = part in SWITCHED and rest.failures >= TRIES
        rest.until = math.inf if off else self._reading + 2 ** (rest.failures - 1)
        if off or part not in self.failed_parts:
            self.failed_parts.add(part)
            self._tell(part, error, off)

    def dropped(self, part: str, error: BaseException) -> None:
        """Record an error of a part that is not tried again, such as a sink."""
        self._on_error(part)
        if part not in self.failed_parts:
            self.failed_parts.add(part)
            self._tell(part, error, True)

    def missed(self, part: str, error: BaseException) -> None:
        """Record an error of a part that is tried again at each occasion, such as a sink without a handle."""
        if part not in self._missed and part not in self.failed_parts:
            self._missed.add(part)
            self._tell(part, error, False)

    def _tell(self, part: str, error: BaseException, off: bool) -> None:
        # The report itself may fail (a closed console). Then there is no other place to report to.
        with suppress(Exception):
            self._report(part, error, off)

    @contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """Run a block that must not stop the training: report an exception once, as an error of ``part``."""
        try:
            yield
        except Exception as error:
            self.failed(part, error)
