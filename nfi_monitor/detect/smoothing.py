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
            setattr(self, name, state[name])


class Ema(Stateful):
    """Exponential average with a time constant in optimizer steps; gaps between readings count."""

    __slots__ = ("step", "value")

    def __init__(self) -> None:
        self.value = math.nan
        self.step = 0

    def update(self, step: int, x: float, time_constant: float) -> float:
        """Add a reading; NaN is skipped. Starts at the first value."""
        if not math.isfinite(x):
            return self.value
        if math.isnan(self.value):
            self.value = x
        else:
            gap = max(step - self.step, 1)
            self.value += (1.0 - math.exp(-gap / max(time_constant, 1e-9))) * (x - self.value)
        self.step = step
        return self.value


class Slope(Stateful):
    """Average slope per step of a quantity: the growth rate d ln‖·‖ / d step when fed logarithms."""

    __slots__ = ("last", "last_step", "step", "value")

    def __init__(self) -> None:
        self.value = math.nan
        self.step = 0
        self.last = math.nan
        self.last_step = 0

    def update(self, step: int, x: float, time_constant: float) -> float:
        if not math.isfinite(x):
            return self.value
        gap = step - self.last_step
        if math.isfinite(self.last) and gap > 0:
            slope = (x - self.last) / gap
            if math.isnan(self.value):
                self.value = 0.0  # growth is assumed absent until shown
            self.value += (1.0 - math.exp(-gap / max(time_constant, 1e-9))) * (slope - self.value)
        self.last, self.last_step, self.step = x, step, step
        return self.value


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
