"""Alert about NaN or Inf in the loss, the gradients or the weights."""

from __future__ import annotations

import math

from nfi_monitor.detect.rules.base import Rule
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Reading, Severity


def spoilt(reading: Reading) -> bool:
    """Return whether a gradient or a weight is NaN or Inf: training on does not repair such weights."""
    norm = reading.get("weight_norm", 0.0)
    return reading.get("non_finite_gradients", 0.0) > 0 or not math.isfinite(norm)


class NonFinite(Rule):
    """NaN or Inf in a reading. In the loss alone, a batch whose targets are all ignored may be the cause."""

    name = "non_finite"
    mechanism = Mechanism.UNKNOWN
    holds = {AlertKind.NON_FINITE: Severity.WARNING}
    labels = {AlertKind.NON_FINITE: "NaN or Inf in the loss, the gradients or the weights"}
    advice = "non_finite"
    charts = ("loss", "gradient norm", "weight norms")
    anytime = True
    confidence = 0.0

    @property
    def looks_at(self) -> tuple[str, ...]:
        return ("loss", "non_finite_gradients", "weight_norm")

    def enter(self, now: Situation) -> bool:
        return spoilt(now.reading) or not math.isfinite(now.reading.get("loss", 0.0))

    def stay(self, now: Situation) -> bool:
        """Stay on until a reading of the gradients shows that they are finite again."""
        return self.enter(now) or "non_finite_gradients" not in now.reading.values

    def severity(self, kind: AlertKind, now: Situation) -> Severity:
        # A mean over no rows is NaN, but moves no weight: the loss alone is no reason to go back.
        return Severity.CRITICAL if spoilt(now.reading) else Severity.WARNING

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        values, found = now.reading.values, {}
        for name in self.looks_at:
            if name in values:
                counted = name == "non_finite_gradients"
                bad = values[name] > 0 if counted else not math.isfinite(values[name])
                found[name] = Evidence(values[name], 0.0 if counted else None, crossed=bad)
        return found
