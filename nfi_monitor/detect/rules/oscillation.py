"""Recognize the edge of stability: the optimizer overshoots from one side of a valley to the other.

Each update goes further than the one before (Cohen et al. 2022; Bai et al. 2025).

- Overshooting: successive gradients oppose each other, and the swing of the logits has grown tenfold.
- Swinging: in addition the curvature along the update is no longer small, the layers below the head swing
  the logits by a good part of a nat, and the loss rises.
- Diverging: the curvature along the update is at the stability limit, and the gradient grows so fast that the
  loss will soon be that of a slingshot.  It needs no logits, so it also holds for a regression.
- Surging: whatever its direction, the gradient is far above what the second moment expects, and the next step
  will bring the loss to that of a slingshot."""

from __future__ import annotations

import math

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.rules.numeric import Absorbing
from nfi_monitor.detect.rules.second_moment import CURVATURE, RMS_T, Kicking, kick_or_swing
from nfi_monitor.detect.signals import felt_displacement
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Severity

_EDGE = (Mechanism.EDGE_OF_STABILITY,)
_OVERSHOOT = "successive updates overshoot along the gradient"

ALIGNMENT = Level(
    signal="alignment",
    quantity="gradient_alignment",
    enter=lambda limits, context: -limits.swing_alignment,
    leave=lambda limits, level: -limits.swing_alignment,
    supports=_EDGE,
    made_of=("gradient_alignment",),
    value=lambda signals, reading, context: signals.alignment,
    below=True,
)
SWING = Level(
    signal="feature_displacement",
    quantity="feature_displacement",
    enter=lambda limits, context: limits.swing_displacement,
    leave=lambda limits, level: min(limits.swing_exit, level / 3),
    supports=_EDGE,
    made_of=("feature_displacement",),
    value=lambda signals, reading, context: felt_displacement(reading),
    may_be_lower=True,
    show="nat",
)
AT_LAST = 0.9
"""Share of ``diverging_curvature`` that is enough where the next step is that of a slingshot."""


class Overshooting(Rule):
    """Successive updates overshoot, and each swings the logits further than the one before."""

    name = "overshooting"
    mechanism = Mechanism.EDGE_OF_STABILITY
    holds = {AlertKind.AT_RISK: Severity.INFO}
    labels = {AlertKind.AT_RISK: "successive updates overshoot further and further"}
    advice = "edge_of_stability"
    charts = ("displacement by one update", "alignment", "curvature along the update")
    levels = (ALIGNMENT,)
    first_evidence = {AlertKind.AT_RISK: ("gradient_alignment", "feature_displacement")}

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        return (
            not signals.other_rows  # each minibatch has gradients of its own
            # A run that lives at the edge oscillates for good, by about the same amount.
            and signals.swell >= limits.overshoot_swell
            and signals.swing >= self._level(now)
            and not now.on(Absorbing.name)
            and now.loss_has_settled
        )

    def stay(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        gradients_oppose = signals.alignment <= -0.5 * limits.swing_alignment
        swings = signals.swing >= limits.overshoot_displacement / 3.0
        return not now.on(Absorbing.name) and swings and gradients_oppose

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        if kind is not AlertKind.AT_RISK:  # *imminent* begins at the rule "swinging"'s own, higher level
            return {}
        signals, limits = now.signals, now.limits
        lowest = signals.swing / signals.swell
        level = max(self._level(now), limits.overshoot_swell * lowest)
        return {"feature_displacement": Evidence(signals.swing, level, lowest)}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.7)

    @staticmethod
    def _level(now: Situation) -> float:
        """Return the swing in nats at which the rule begins; infinite where no gradients are opposed."""
        signals, limits = now.signals, now.limits
        level = limits.overshoot_displacement * now.level_of(Overshooting.name)
        if signals.alignment <= -limits.swing_alignment:
            return level
        # A single turn may be noise, so the swing must be larger. It comes a step or two before the average.
        return 2.0 * level if signals.turn <= -limits.overshoot_turn else math.inf


class Swinging(Rule):
    """Updates overshoot, and the logits swing with them."""

    name = "swinging"
    mechanism = Mechanism.EDGE_OF_STABILITY
    holds = {AlertKind.AT_RISK: Severity.INFO, AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {AlertKind.AT_RISK: _OVERSHOOT, AlertKind.IMMINENT: _OVERSHOOT}
    advice = "edge_of_stability"
    charts = ("displacement by one update", "alignment", "curvature along the update")
    levels = (ALIGNMENT, SWING)
    first_evidence = dict.fromkeys(
        (AlertKind.AT_RISK, AlertKind.IMMINENT),
        ("secant_curvature", "gradient_alignment", "feature_displacement"),
    )

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        return (
            signals.alignment <= -limits.swing_alignment
            and now.loss_has_settled
            and not now.on(Absorbing.name)
            and signals.curvature_peak >= limits.swing_curvature * now.context.stability_limit
            and signals.swing >= limits.swing_displacement * now.level_of(self.name)
            # A run may live at the edge for good: it oscillates, and its loss stays where it is.
            and now.loss_stands_out
            and not now.ends_by_itself
        )

    def stay(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        # The alignment counts, too: features may move for hundreds of steps after the gradients agree again.
        gradients_oppose = signals.alignment <= -0.5 * limits.swing_alignment
        return not now.on(Absorbing.name) and signals.swing >= limits.swing_exit and gradients_oppose

    def nears(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        return signals.alignment <= -limits.swing_alignment and signals.swing >= limits.swing_exit

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        signals, limits = now.signals, now.limits
        return {
            "gradient_alignment": Evidence(signals.alignment, -limits.swing_alignment, 0.0),
            "feature_displacement": Evidence(
                signals.swing, limits.swing_displacement * now.level_of(self.name)
            ),
        }

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        share = now.limits.swing_curvature * now.context.stability_limit
        return {"secant_curvature": Evidence(now.signals.curvature_peak, share), **now.loss_evidence}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.9)


class Diverging(Rule):
    """Each update overshoots further, and the loss will be that of a slingshot within a few steps.

    The other rules of this file measure a swing in nats.  This one needs no logits, only gradients and loss.
    So it also holds for a regression.
    """

    name = "diverging"
    mechanism = Mechanism.EDGE_OF_STABILITY
    holds = {AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {AlertKind.IMMINENT: "an oscillation grows from step to step"}
    advice = "edge_of_stability"
    charts = ("alignment", "curvature along the update")
    levels = (CURVATURE,)
    first_evidence = {AlertKind.IMMINENT: ("secant_curvature", "gradient_alignment", "feature_displacement")}

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        return (
            signals.same_rows  # each minibatch has gradients of its own
            and not now.on(Absorbing.name)
            and signals.alignment <= -limits.diverging_alignment
            and signals.curvature_peak >= self._steep(now)
            and now.loss_above_average >= limits.diverging_rise
            and now.steps_to_slingshot <= limits.diverging_steps
            and now.outgrows(self.name)
            and not now.ends_by_itself
        )

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and self._half_way(now)

    def nears(self, now: Situation) -> bool:
        return now.signals.same_rows and self._half_way(now)

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        signals, limits, average = now.signals, now.limits, math.exp(now.spike.baseline.average)
        return {
            "secant_curvature": Evidence(signals.curvature_peak, self._steep(now)),
            "gradient_alignment": Evidence(signals.alignment, -limits.diverging_alignment, 0.0),
            "loss": Evidence(now.loss, average * math.exp(limits.diverging_rise), average),
        }

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.9)

    def forecast(self, now: Situation) -> tuple[int, int, int] | None:
        steps = now.steps_to_slingshot
        if not 1.0 <= steps <= now.limits.diverging_steps:
            return None
        return max(round(steps / 2.0), 1), round(steps), round(2.0 * steps)

    @staticmethod
    def _steep(now: Situation) -> float:
        """Return the curvature at which an oscillation diverges.

        Beside the stability limit, an oscillation grows and then ends by itself, because it moves the weights
        to where the curvature is lower (Damian et al. 2023, arXiv 2209.15594).
        """
        share = AT_LAST if now.steps_to_slingshot <= 1.0 else 1.0
        return share * now.limits.diverging_curvature * now.context.stability_limit

    @classmethod
    def _half_way(cls, now: Situation) -> bool:
        signals = now.signals
        opposed = signals.alignment <= -0.5 * now.limits.diverging_alignment
        return opposed and signals.curvature_peak >= 0.5 * cls._steep(now)


class Surging(Rule):
    """The gradient and the loss grow so fast that the next step brings the loss of a slingshot.

    Oscillations in many directions show neither opposed gradients nor a high curvature along the update.
    Where the second moment has decayed, the rule "kicking" names that.
    """

    name = "surging"
    mechanism = Mechanism.EDGE_OF_STABILITY
    holds = {AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {AlertKind.IMMINENT: "the loss and the gradient surge"}
    advice = "edge_of_stability"
    charts = ("RMS_t", "gradient norm")
    levels = (RMS_T,)
    first_evidence = {AlertKind.IMMINENT: ("rms_t_max",)}

    def enter(self, now: Situation) -> bool:
        return (
            now.signals.same_rows  # another minibatch may be a harder one
            and not now.on(Absorbing.name)
            and not now.on(Kicking.name)
            and not now.raised_from_outside
            and now.signals.rms_t_peak >= now.limits.rms_t_imminent * now.level_of(self.name)
            and now.loss_above_average >= now.limits.surging_rise
            and now.steps_to_slingshot <= now.limits.surging_steps
            and now.outgrows(self.name)
        )

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and not now.on(Kicking.name) and self._half_way(now)

    def nears(self, now: Situation) -> bool:
        return now.signals.same_rows and self._half_way(now)

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        average = math.exp(now.spike.baseline.average)
        level = now.limits.rms_t_imminent * now.level_of(self.name)
        return {
            "rms_t_max": Evidence(now.signals.rms_t_peak, level, now.signals.rms_t_mean),
            "loss": Evidence(now.loss, average * math.exp(now.limits.surging_rise), average),
        }

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.7)

    @staticmethod
    def _half_way(now: Situation) -> bool:
        signals, limits = now.signals, now.limits
        risen = now.loss_above_average >= 0.5 * limits.surging_rise
        return risen and signals.rms_t_peak >= 0.5 * limits.rms_t_imminent
