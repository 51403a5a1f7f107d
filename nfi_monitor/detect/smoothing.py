"""Averages over readings that may be several steps apart, with state that survives a checkpoint."""

from __future__ import annotations

import math
from typing import Any


class Stateful:
    """``state_dict`` over ``__slots__``: what a detector part must carry over a resume."""

    __slots__: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.__slots__:
            if name in state:  # or it is of an earlier version
                setattr(self, name, state[name])


class Ema(Stateful):
    """Exponential average with a time constant in optimizer steps; gaps between readings count."""

    __slots__ = ("step", "value")

    def __init__(self) -> None:
        self.value = math.nan
        self.step = 0

    def update(self, step: int, x: float, time_constant: float, *, wary: bool = False) -> float:
        """Add a reading; NaN is skipped. Starts at the first value.

        ``wary``: after a long pause, too, one reading is one reading, and takes the place of no average.
        """
        if not math.isfinite(x):
            return self.value
        if math.isnan(self.value):
            self.value = x
        else:
            gap: float = max(step - self.step, 1)
            if wary:
                gap = min(gap, max(time_constant, 1.0))
            self.value += (1.0 - math.exp(-gap / max(time_constant, 1e-9))) * (x - self.value)
        self.step = step
        return self.value


class Growth:
    """Slope per step of a noisy quantity; the growth rate d ln‖·‖ / d step when fed logarithms.

    The difference of two averages, with time constants T and T/2, over the T/2 steps that one lags
    behind the other: exact on a line.  An average over differences of neighbours lost: it equals
    (x − average)/T and so carries the whole noise of the last reading.
    """

    def __init__(self) -> None:
        self._slow, self._fast = Ema(), Ema()
        self.value = math.nan

    def update(self, step: int, x: float, time_constant: float) -> float:
        """Add a reading; NaN is skipped."""
        if math.isfinite(x):
            slow = self._slow.update(step, x, time_constant)
            fast = self._fast.update(step, x, 0.5 * time_constant)
            self.value = (fast - slow) / (0.5 * time_constant)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self._slow.state_dict(), "fast": self._fast.state_dict(), "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._slow.load_state_dict(state["slow"])
        self._fast.load_state_dict(state["fast"])
        self.value = state["value"]


class Hysteresis(Stateful):
    """A switch with two levels: on at or above ``enter``, off below ``exit``."""

    __slots__ = ("on", "since")

    def __init__(self) -> None:
        self.on = False
        self.since = 0

    def update(self, step: int, enter: bool, stay: bool) -> bool:
        if self.on and not stay:
            self.on = False
        elif not self.on and enter:
            self.on, self.since = True, step
        return self.on
