"""Keep what the alarms of each rule led to: a rule whose alarms led to nothing needs a higher level.

An ordinary run may show the signs of a slingshot again and again without having one.  Each alarm that led to
nothing doubles the level of the rule that raised it.  The factor fades slowly, and a slingshot resets it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypedDict

from nfi_monitor.schema import Between, decode
from nfi_monitor.types import AlertKind

HIGHEST = 16.0
"""Largest factor of a level."""
FADES = 100.0
"""Time in τ in which a factor falls to its half, at least FADES_STEPS."""
FADES_STEPS = 5_000.0
"""Least number of steps in which a factor falls to its half: with a short τ a run has many τ."""


class _Saved(TypedDict):
    came_true: dict[str, int]
    led_to_nothing: dict[str, int]
    raised: dict[str, tuple[Annotated[float, Between(1, HIGHEST)], int]]


class Record:
    """Count alarms by the name of their rule: those that came true, and those that led to nothing."""

    def __init__(self) -> None:
        self.came_true: dict[str, int] = {}
        self.led_to_nothing: dict[str, int] = {}
        self._raised: dict[str, tuple[float, int]] = {}  # rule → (factor, step at which it was so high)
        self._held: dict[AlertKind, set[str]] = {}  # kind of a firing warning → rules that have held it
        self._highest: dict[AlertKind, float] = {}  # kind of a firing warning → highest loss since it began
        # Rule → (highest loss of its alarms that no slingshot followed, step at which the last one ended).
        self._passed: dict[str, tuple[float, int]] = {}

    def factor(self, rule: str, step: int, tau: float) -> float:
        """Return the present factor of the rule's levels, from 1 to HIGHEST."""
        raised = self._raised.get(rule)
        if raised is None:
            return 1.0
        factor, since = raised
        half_lives = max(step - since, 0) / max(FADES * tau, FADES_STEPS)
        return float(max(factor * 0.5**half_lives, 1.0))

    def passed(self, rule: str, step: int, tau: float) -> float:
        """Return the highest loss of the rule's alarms that no slingshot followed; 0: no recent ones."""
        highest, since = self._passed.get(rule, (0.0, step))
        return highest if step - since <= max(FADES * tau, FADES_STEPS) else 0.0

    def disappoint(self, rule: str, step: int, tau: float) -> None:
        """Count an alarm that ended without a slingshot."""
        self.led_to_nothing[rule] = self.led_to_nothing.get(rule, 0) + 1
        self._raised[rule] = (min(2.0 * self.factor(rule, step, tau), HIGHEST), step)

    def update(
        self, kind: AlertKind, holding: Collection[str], step: int, tau: float, *, loss: float, burst: bool
    ) -> None:
        """Add the rules that hold the warning of ``kind`` now; if it has ended, count that it led to nothing.

        ``loss``: of this step.  ``burst``: a burst of the loss has followed the warning. That is neither a
        slingshot nor nothing.
        """
        held = self._held.setdefault(kind, set())
        held.update(holding)
        if held and loss > self._highest.get(kind, 0.0):
            self._highest[kind] = loss
        if not holding and held:
            highest = self._highest.pop(kind, 0.0)
            for rule in held:
                self._passed[rule] = max(highest, self.passed(rule, step, tau)), step
                if not burst:
                    self.disappoint(rule, step, tau)
            held.clear()

    def slingshot(self, step: int, tau: float) -> None:
        """Count the firing warnings as come true; reset the factors of those that ended within τ."""
        for held in self._held.values():
            for rule in held:
                self.came_true[rule] = self.came_true.get(rule, 0) + 1
                self._raised.pop(rule, None)
                self._passed.pop(rule, None)
            held.clear()
        self._highest.clear()
        for ended in (self._raised, self._passed):
            for rule, (_, since) in list(ended.items()):
                if step - since <= tau:
                    del ended[rule]

    def is_doubtful(self, rule: str) -> bool:
        """Return whether more alarms of the rule led to nothing than came true."""
        return self.led_to_nothing.get(rule, 0) > self.came_true.get(rule, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and factors in plain types."""
        return {
            "came_true": dict(self.came_true),
            "led_to_nothing": dict(self.led_to_nothing),
            "raised": {rule: list(raised) for rule, raised in self._raised.items()},
            "passed": {rule: list(passed) for rule, passed in self._passed.items()},
            "highest": {kind.value: loss for kind, loss in self._highest.items()},
            "held": {kind.value: sorted(held) for kind, held in self._held.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Raises ValueError for another state."""
        saved = decode(_Saved, state)
        self.came_true, self.led_to_nothing = saved["came_true"], saved["led_to_nothing"]
        self._raised = saved["raised"]
        passed = state.get("passed", {})  # earlier versions had none
        self._passed = decode(dict[str, tuple[Annotated[float, Between(0, math.inf)], int]], passed)
        highest = decode(dict[str, Annotated[float, Between(0, math.inf)]], state.get("highest", {}))
        self._highest = {AlertKind(kind): loss for kind, loss in highest.items()}
        held = decode(dict[str, list[str]], state.get("held", {}))
        self._held = {AlertKind(kind): set(rules) for kind, rules in held.items()}
