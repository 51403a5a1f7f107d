"""Recognize an update that is too long for the loss of its own rows, whatever made it so.

To first order, an update s lowers the loss L of the rows that made the gradient g by p = −gᵀs, the predicted
reduction (Nocedal and Wright 2006, section 4.1).  A loss that is quadratic along s and never negative becomes
L − p + p²/(4L) or more: the curvature along s is at least p²/(2L), or the loss would fall below zero.  So it
is higher after the update than before if p > 4L, and 49 times as high if p = 16L.  No Hessian, no second pass
and no logits are needed, and every minibatch is compared with itself.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.rules.numeric import Absorbing
from nfi_monitor.detect.rules.second_moment import RMS_T, kick_or_swing
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Severity

REDUCTION = Level(
    signal="reduction",
    quantity="reduction_ratio",
    enter=lambda limits, context: limits.overreach_ratio,
    leave=lambda limits, level: 0.25 * level,
    supports=(Mechanism.EDGE_OF_STABILITY, Mechanism.SECOND_MOMENT),
    made_of=("predicted_reduction",),
    value=lambda signals, reading, context: signals.reduction,
    bands=("reduction_ratio",),
)


class Overreaching(Rule):
    """The update is so long that the loss of its own rows must rise, and the loss does rise."""

    name = "overreaching"
    mechanism = Mechanism.EDGE_OF_STABILITY
    holds = {AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {AlertKind.IMMINENT: "updates are too long to lower the loss of their own rows"}
    advice = "edge_of_stability"
    charts = ("predicted reduction over loss", "RMS_t")
    levels = (REDUCTION, RMS_T)
    first_evidence = {AlertKind.IMMINENT: ("reduction_ratio", "rms_t_max")}

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        return (
            signals.reduction >= limits.overreach_ratio
            # No training goes on with such updates: the loss that is told is a fraction of the trained one.
            and not signals.reduction_usual >= limits.overreach_ratio
            and not now.on(Absorbing.name)
            and not now.raised_from_outside
            and now.loss_has_settled
            # A usual update is too long for a minibatch that is nearly fitted, and does no harm.
            and signals.rms_t >= limits.overreach_rms_t
            # A single hard minibatch has a gradient of its own; the one before it is as usual.
            and (signals.same_rows or signals.reduction_before >= 0.5 * limits.overreach_ratio)
            and now.loss_above_average >= self._rise(now)
            and now.loss_share >= limits.kick_loss
            and now.outgrows(self.name)
            and self._steps(now) <= limits.overreach_steps
        )

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and self._half_way(now)

    def nears(self, now: Situation) -> bool:
        return self._half_way(now) and now.loss_above_average >= 0.5 * now.limits.overreach_rise

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        limits, signals, average = now.limits, now.signals, math.exp(now.spike.baseline.average)
        return {
            "reduction_ratio": Evidence(signals.reduction_peak, limits.overreach_ratio),
            "rms_t_max": Evidence(signals.rms_t_peak, limits.overreach_rms_t, signals.rms_t_mean),
            "loss": Evidence(now.loss, average * math.exp(self._rise(now)), average),
        }

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.8)

    @staticmethod
    def _rise(now: Situation) -> float:
        """Return the rise of the loss above its average, in nats, at which the rule begins.

        Between minibatches it is at least twice the mean change from one loss to the next: a hinge loss
        jumps from 0 to 1e-3 and back for good.
        """
        noise = 0.0 if now.signals.same_rows else 2.0 * now.spike.baseline.noise
        return max(now.limits.overreach_rise, noise)

    @staticmethod
    def _steps(now: Situation) -> float:
        """Return the steps until the loss is that of a slingshot, if each multiplies it by (1 − p/(2L))²."""
        share, factor = now.loss_share, 0.5 * now.signals.reduction - 1.0
        if share >= 1.0:
            return 0.0
        return -math.log(share) / (2.0 * math.log(factor)) if share > 0.0 and factor > 1.0 else math.inf

    @staticmethod
    def _half_way(now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        kicks = signals.rms_t_peak >= limits.overreach_rms_t
        return bool(kicks and signals.reduction_peak >= 0.5 * limits.overreach_ratio)
