"""Average readings that may be several steps apart; the averages' state survives a checkpoint."""

from __future__ import annotations

import math
from math import exp as _exp
from math import isfinite as _isfinite
from math import log as _log
from typing import Any, NamedTuple

from nfi_monitor.schema import LARGEST_INT
from nfi_monitor.types import Thresholds


class Stateful:
    """Save and load the attributes in ``__slots__``.

    The attributes' names are keys in users' checkpoints: do not rename them.
    """

    __slots__: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return name → value of each attribute."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, also in an earlier version.

        Raises ValueError for a value of another type than the present one (:func:`of_its_kind`).
        """
        for name in self.__slots__:
            if name in state:  # an earlier version may have no such attribute
                setattr(self, name, of_its_kind(getattr(self, name), state[name], name))


def of_its_kind(present: Any, saved: Any, name: str) -> Any:
    """Return ``saved`` if it may replace the ``present`` value of an attribute. Raises ValueError if not.

    The present value must be that of a new object: a float there stands for any number, a bool for a bool or
    None, a list for a list of numbers, or of lists of numbers.
    """
    if isinstance(present, list):
        if isinstance(saved, (list, tuple)) and all(_is_number(item) or _are_numbers(item) for item in saved):
            return [list(item) if isinstance(item, (list, tuple)) else item for item in saved]
    elif isinstance(present, bool):
        if saved is None or isinstance(saved, bool):
            return saved
    elif isinstance(present, float):
        if _is_number(saved):
            return saved
    elif type(saved) is type(present) and (isinstance(saved, str) or abs(saved) <= LARGEST_INT):
        return saved
    raise ValueError(f"{name}: expected a value like {present!r}, got {type(saved).__name__}")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= LARGEST_INT)


class Ema(Stateful):
    """Exponential average with a time constant in optimizer steps; a reading after a gap has more weight."""

    __slots__ = ("step", "value")

    def __init__(self) -> None:
        self.value = math.nan
        self.step = 0

    def update(self, step: int, x: float, time_constant: float, *, limit_gap: bool = False) -> float:
        """Add a value and return the average, which starts at the first value. NaN and Inf are skipped.

        ``limit_gap``: count a gap as one time constant at most.  Then a single reading after a long pause
        does not replace the average.
        """
        if not _isfinite(x):
            return self.value
        value = self.value
        if value != value:
            value = x
        else:
            gap: float = step - self.step
            if gap < 1:
                gap = 1
            if limit_gap and gap > 1:
                gap = min(gap, max(time_constant, 1.0))
            # Comparisons and not max(): this runs two dozen times in a reading.
            per = time_constant if time_constant > 1e-9 else 1e-9
            value += (1.0 - _exp(-gap / per)) * (x - value)
        self.step = step
        self.value = value
        return value


class Growth:
    """Slope per step of a noisy quantity; of logarithms, the growth rate d ln‖·‖ / d step.

    The slope is the difference of two averages, with time constants T and T/2, divided by T/2.  One average
    lags behind the other by T/2 steps, so the slope is exact on a line.  Rejected: an average over
    differences of neighbours, because it equals (x − average)/T and carries all noise of the last reading.
    """

    def __init__(self) -> None:
        self._slow, self._fast = Ema(), Ema()
        self.value = math.nan

    def update(self, step: int, x: float, time_constant: float) -> float:
        """Add a value and return the slope. NaN and Inf are skipped."""
        if math.isfinite(x):
            slow = self._slow.update(step, x, time_constant)
            fast = self._fast.update(step, x, 0.5 * time_constant)
            self.value = (fast - slow) / (0.5 * time_constant)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Return both averages and the slope in plain types."""
        return {"slow": self._slow.state_dict(), "fast": self._fast.state_dict(), "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._slow.load_state_dict(state["slow"])
        self._fast.load_state_dict(state["fast"])
        self.value = of_its_kind(math.nan, state["value"], "value")


class Hysteresis(Stateful):
    """A switch with two conditions: one switches it on, another keeps it on. ``since``: step it went on."""

    __slots__ = ("on", "since")

    def __init__(self) -> None:
        self.on = False
        self.since = 0

    def turn(self, step: int, on: bool) -> bool:
        """Switch on or off at ``step``; return whether it is on."""
        if on and not self.on:
            self.since = step
        self.on = on
        return on

    def update(self, step: int, enter: bool, stay: bool) -> bool:
        """Switch on if ``enter`` holds, off if ``stay`` no longer does; return whether it is on."""
        if self.on and not stay:
            self.on = False
        elif not self.on and enter:
            self.on, self.since = True, step
        return self.on


def log_or_nan(x: float) -> float:
    """Return ln x, or NaN where x is not positive or not finite."""
    return _log(x) if _isfinite(x) and x > 0 else math.nan


def recent_lowest(previous: float, x: float, fade: float) -> float:
    """Return the recent minimum: the previous minimum rises by ``fade``, so that an old one is replaced."""
    return x if math.isnan(previous) else min(x, previous + fade)


def fading_max(previous: float, x: float, keep: float) -> float:
    """Return the recent maximum: the previous one shrinks by the factor ``keep``. NaN and Inf are skipped."""
    if not _isfinite(x):
        return previous
    if previous != previous:
        return x
    kept = previous * keep
    return kept if kept > x else x


class Times(NamedTuple):
    """Time constants of one reading, in steps (``keep``: a factor)."""

    tau: float
    gap: int  # steps since the last reading
    window: float  # time constant of violation and RMS_t
    long: float  # time constant of growth, a small difference of noisy numbers: no cap, also at β2 = .999
    short: float  # time constant of displacements
    keep: float
    """Factor by which a peak fades until this reading.

    Peaks fade within a few steps.  They keep an alert firing through the gaps of a chattering gradient, but
    not through a calm one.
    """

    @classmethod
    def of(cls, step: int, last_step: int, tau: float, limits: Thresholds) -> Times:
        gap = step - last_step if step >= last_step else 1  # the step counter may be set back
        short = min(limits.displacement_smoothing * tau, limits.displacement_cap)
        return cls(
            tau=tau,
            gap=gap,
            window=min(limits.absorbing_smoothing * tau, limits.smoothing_cap),
            long=max(limits.absorbing_smoothing * tau, 10.0),
            short=short,
            keep=math.exp(-gap / max(short, 1.0)),
        )
