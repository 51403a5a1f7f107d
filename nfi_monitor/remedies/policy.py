"""Decide which rungs the Autopilot takes for an alert. No torch, no state."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum

from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism, Phase, Severity

FEWEST = 100
"""Minimum number of steps, for any τ, before a remedy counts as not enough."""


class Rung(IntEnum):
    """The actions of the Autopilot, the mildest first."""

    LOSS = 1  # use a loss that cannot absorb; the training is otherwise the same
    COOL = 2  # lower the learning rate for a while
    STOP = 3  # take a snapshot, and end the training

    def __str__(self) -> str:
        return self.name.lower()


_LOSS_AT = ("at_risk", "warning", "imminent", "slingshot", "never")
_STOPS = ("never", "flag", "raise")


@dataclass(frozen=True)
class Policy:
    """What an Autopilot may do, and when. Times are in τ = 1/(1−β2) optimizer steps.

    Raises ValueError for an invalid value.
    """

    loss_at: str = "warning"
    """The first alert of numerical feature inflation at which the loss is replaced: "at_risk" (rows absorb;
    this can last forever without a slingshot), "warning" (the feature mean also grows), "imminent",
    "slingshot" (only against the next one) or "never"."""
    cool: bool = True
    """Whether the learning rate may be lowered, at *imminent*. Before second-moment slingshots and at the
    edge of stability, no other remedy helps."""
    factor: float = 0.1
    """Factor of the learning rate. .3 only delays a slingshot; below .03 a run hardly learns."""
    hold: float = 2.0
    """Minimum time of a cool-down in τ (at least 10 steps). It doubles each time the alarm comes back within
    10 τ after a cool-down, up to eight times as long."""
    calm: float = 1.0
    """Time in τ without the alarm before the rate comes back: the hysteresis."""
    patience: float = 5.0
    """Time in τ (at least 100 steps) that an alert may go on under a remedy before the next rung. Lower: a
    remedy that works seems not to work, because the alert's signals are averaged over half a τ."""
    stop: str = "flag"
    """The action if no other rung is left, and at NaN or Inf in gradients or weights. "flag" takes a snapshot
    and sets ``should_stop``; "raise" also raises ``AutopilotStop`` from ``optimizer.step()``; "never" does
    neither."""

    def __post_init__(self) -> None:
        if self.loss_at not in _LOSS_AT:
            raise ValueError(f"loss_at={self.loss_at!r}: use one of {', '.join(map(repr, _LOSS_AT))}.")
        if self.stop not in _STOPS:
            raise ValueError(f"stop={self.stop!r}: use one of {', '.join(map(repr, _STOPS))}.")
        if not 0.0 < self.factor < 1.0:
            raise ValueError(f"factor must be between 0 and 1, got {self.factor!r}.")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{item.name} must be a positive finite number, got {value!r}.")

    def advised(self, alert: Alert) -> tuple[Rung, ...]:
        """Return the rungs to take for a new alert, in this order; empty: only watch it."""
        wanted: list[Rung] = []
        if alert.state is AlertState.RESOLVED:
            return ()
        if alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION and self._loss_is_due(alert):
            wanted.append(Rung.LOSS)
        # An external cause is over already: a smaller rate now comes too late.
        if alert.kind is AlertKind.IMMINENT and self.cool and alert.mechanism is not Mechanism.EXTERNAL:
            wanted.append(Rung.COOL)
        # In the loss alone it may come from a batch without a row that counts: nothing is spoilt.
        spoilt = alert.kind is AlertKind.NON_FINITE and alert.severity is Severity.CRITICAL
        if spoilt and self.stop != "never":
            wanted.append(Rung.STOP)
        return tuple(wanted)

    def next_rung(self, alert: Alert, last: Rung | None, phase: Phase) -> Rung | None:
        """Return the next rung for an alert that has gone on for :attr:`patience` since ``last``, or None.

        ``phase`` is the run's present phase: an alert may have a higher severity than the phase.
        """
        if alert.state is AlertState.RESOLVED:
            return None
        stop = Rung.STOP if self.stop != "never" and last is not Rung.STOP else None
        if alert.kind is AlertKind.SLINGSHOT:
            # A loss that stays high is not a slingshot but a divergence.
            return stop if phase is Phase.SLINGSHOT else None
        if alert.kind is AlertKind.IMMINENT and last is Rung.COOL:
            return stop
        if alert.kind is AlertKind.AT_RISK and last is Rung.LOSS and self.cool:
            return Rung.COOL if self.asks_to_cool(alert, phase) else None
        return None

    def asks_to_cool(self, alert: Alert, phase: Phase) -> bool:
        """Return whether an alert for which the rate was lowered still needs a low rate."""
        return alert.kind is AlertKind.IMMINENT or phase in (Phase.INFLATING, Phase.IMMINENT)

    def patience_in_steps(self, tau: float) -> int:
        return max(round(self.patience * tau), FEWEST)

    def hold_in_steps(self, tau: float, repeated: int) -> int:
        """Return the steps of a cool-down that follows ``repeated`` others too soon."""
        return max(round(self.hold * tau), 10) << min(repeated, 3)

    def _loss_is_due(self, alert: Alert) -> bool:
        if self.loss_at == "never":
            return False
        if alert.kind is AlertKind.AT_RISK:
            rises = alert.severity.rank >= Severity.WARNING.rank
            return self.loss_at == "at_risk" or (self.loss_at == "warning" and rises)
        if alert.kind is AlertKind.IMMINENT:
            return self.loss_at != "slingshot"
        return alert.kind is AlertKind.SLINGSHOT
