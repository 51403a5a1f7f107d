"""Recognize numerical feature inflation in three stages: absorbing, inflating, imminent (Liu et al. 2026).

- Absorbing: rounding breaks the zero-sum of the rows' gradients.
- Inflating: the rows absorb, and the feature mean grows (Theorem 3.7).
- Imminent: in addition, updates move the logits by a good part of a nat within a twentieth of τ."""

from __future__ import annotations

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.forecast import steps_to_spike, steps_when_imminent
from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Severity

_NUMERIC = (Mechanism.NUMERICAL_FEATURE_INFLATION,)

VIOLATION = Level(
    signal="violation",
    quantity="zero_sum_violation_smoothed",
    enter=lambda limits, context: limits.absorbing_enter,
    leave=lambda limits, level: limits.absorbing_exit,
    supports=_NUMERIC,
    made_of=("zero_sum_violation", "zero_sum_violation_weight", "zero_sum_violation_batch"),
    value=lambda signals, reading, context: signals.violation,
    bands=("zero_sum_violation_smoothed",),
)
GROWTH = Level(
    signal="growth",
    quantity="feature_mean_growth",
    enter=lambda limits, context: limits.inflating_growth,
    leave=lambda limits, level: 0.5 * limits.inflating_growth,
    supports=_NUMERIC,
    made_of=("feature_mean_norm",),
    value=lambda signals, reading, context: signals.growth * context.tau,
    evidence_per_step=True,
    show="percent of τ",
    bands=("feature_mean_growth",),
)
DISPLACEMENT = Level(
    signal="displacement",
    quantity="logit_displacement",
    enter=lambda limits, context: limits.imminent_displacement,
    leave=lambda limits, level: min(limits.imminent_exit, level / 3),
    supports=_NUMERIC,
    made_of=("margin_displacement", "logit_displacement"),
    value=lambda signals, reading, context: signals.displacement,
    may_be_lower=True,
    show="nat",
    bands=("logit_displacement", "margin_displacement"),
)


class _Numeric(Rule):
    mechanism = Mechanism.NUMERICAL_FEATURE_INFLATION
    advice = "numerical_feature_inflation"
    proves = True

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        """Return None: ``name_mechanism`` checks the violation itself, before it asks any rule.

        Below the violation's level, hysteresis alone keeps the rule on.
        """
        return None


class Absorbing(_Numeric):
    """Rounding breaks the zero-sum. This state can last for thousands of steps."""

    name = "absorbing"
    holds = {AlertKind.AT_RISK: Severity.INFO}
    phase = Phase.ABSORBING
    labels = {AlertKind.AT_RISK: "rounding absorbs confident rows: their gradients no longer sum to zero"}
    charts = ("zero-sum violation", "rows that rounding silences", "margins")
    levels = (VIOLATION,)
    first_evidence = {AlertKind.AT_RISK: ("zero_sum_violation_smoothed", "feature_mean_growth")}

    def enter(self, now: Situation) -> bool:
        return now.signals.violation >= VIOLATION.enter(now.limits, now.context)

    def stay(self, now: Situation) -> bool:
        return now.signals.violation >= now.limits.absorbing_exit

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        return {
            "zero_sum_violation_smoothed": Evidence(now.signals.violation, now.limits.absorbing_enter, 0.0)
        }


class Inflating(_Numeric):
    """The feature mean grows while rows are absorbed."""

    name = "inflating"
    holds = {AlertKind.AT_RISK: Severity.WARNING}
    phase = Phase.INFLATING
    labels = {AlertKind.AT_RISK: "rounding absorbs confident rows and the feature mean grows"}
    charts = ("global means", "growth of the means")
    levels = (GROWTH,)

    def enter(self, now: Situation) -> bool:
        grown = now.signals.growth * now.context.tau >= GROWTH.enter(now.limits, now.context)
        return now.on(Absorbing.name) and grown

    def stay(self, now: Situation) -> bool:
        level = GROWTH.leave(now.limits, now.limits.inflating_growth)
        return now.on(Absorbing.name) and now.signals.growth * now.context.tau >= level

    def severity(self, kind: AlertKind, now: Situation) -> Severity:
        """Return WARNING, or INFO where a growth like this one has led to nothing in this run."""
        level = now.limits.inflating_growth * now.level_of(self.name)
        return self.holds[kind] if now.signals.growth * now.context.tau >= level else Severity.INFO

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        level = now.limits.inflating_growth / now.context.tau
        return {"feature_mean_growth": Evidence(now.signals.growth, level, 0.0)}

    def forecast(self, now: Situation) -> tuple[int, int, int] | None:
        """Return the forecast of :func:`steps_to_spike`. Without growth no forecast is possible."""
        signals, context = now.signals, now.context
        # No forecast where the layers below the head move the logits more than the head does: their movement
        # makes the slingshot. No forecast under weight decay either: it reduces margins, which the formula
        # does not include.
        # The rule "imminent" has a forecast of its own.
        if signals.swing > signals.head_displacement or context.decoupled_decay or now.on(Imminent.name):
            return None
        return steps_to_spike(
            signals.displacement_rms * now.displacement_steps,
            signals.violation,
            signals.displacement_slope,
            signals.loss_rise,
            context.beta2,
            context.tau,
            signals.clock,
        )


class Imminent(_Numeric):
    """Updates move the logits, so a slingshot is near."""

    name = "imminent"
    holds = {AlertKind.AT_RISK: Severity.WARNING, AlertKind.IMMINENT: Severity.CRITICAL}
    phase = Phase.IMMINENT
    labels = {AlertKind.IMMINENT: "rounding absorbs confident rows and updates already move the logits"}
    charts = ("displacement by one update",)
    levels = (DISPLACEMENT,)
    first_evidence = {
        AlertKind.IMMINENT: (
            "logit_displacement", "margin_displacement", "feature_displacement",
            "zero_sum_violation_smoothed", "feature_mean_growth",
        )
    }  # fmt: skip

    def enter(self, now: Situation) -> bool:
        if not now.on(Absorbing.name) or now.loss_falls:
            return False
        if swelling(now):
            return True
        signals, limits = now.signals, now.limits
        # The means may also shrink, as with tied embeddings; behind a norm they hardly move, but δ rises.
        grows = abs(signals.growth) * now.context.tau >= limits.imminent_growth
        grows = grows or signals.displacement_rise >= limits.imminent_rise
        return grows and signals.displacement >= displacement_level(now)

    def stay(self, now: Situation) -> bool:
        return now.on(Absorbing.name) and (displacing(now) or swelling(now))

    def forecast(self, now: Situation) -> tuple[int, int, int] | None:
        """Return the forecast of :func:`steps_when_imminent`."""
        signals = now.signals
        return steps_when_imminent(signals.displacement_rise, signals.loss_rise, now.context.tau)

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        signals = now.signals
        lowest = signals.displacement / signals.displacement_rise
        return {"logit_displacement": Evidence(signals.displacement, displacement_level(now), lowest)}

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        """Return the growth and the swell that *imminent* requires, if they were met."""
        signals, limits = now.signals, now.limits
        claimed = {}
        if kind is not AlertKind.AT_RISK:  # the rule "inflating" raises *at risk* at its own, lower level
            level = limits.imminent_growth / now.context.tau
            shrinks = signals.growth < 0
            level = -level if shrinks else level
            claimed["feature_mean_growth"] = Evidence(signals.growth, level, 0.0, below=shrinks)
        if swelling(now):
            lowest = signals.swing / signals.swell
            level = max(limits.imminent_exit, limits.imminent_swell * lowest)
            claimed["feature_displacement"] = Evidence(signals.swing, level, lowest)
        return claimed


def displacement_level(now: Situation) -> float:
    """Return the δ of one update, in nats, at which *imminent* begins.

    The further δ has risen above its recent minimum, the lower the level.  Two kinds of run stay at a high δ
    forever, but it does not rise: soft-capped logits, which move between minibatches, and a run that goes on
    learning from minibatches.  The level is higher while a schedule has raised the learning rate, and after
    alarms that led to nothing.
    """
    limits, rise = now.limits, now.signals.displacement_rise
    level = limits.imminent_displacement
    if rise >= limits.imminent_rise:
        level = max(min(level, limits.imminent_product / rise**2), limits.imminent_lowest)
        # The updates of minibatches are only partly in one direction: they add up like a random walk.
        level /= now.displacement_steps ** (0.5 if now.signals.other_rows else 1.0)
    return level * now.signals.rate_rise * now.level_of(Imminent.name)


def displacing(now: Situation) -> bool:
    """Return whether δ over a twentieth of τ is at least the level at which *imminent* ends."""
    signals, limits = now.signals, now.limits
    factor = 0.5 if now.on(Imminent.name) else 1.0
    risen = signals.displacement_rise >= factor * limits.imminent_rise
    return signals.displacement * (now.displacement_steps if risen else 1.0) >= limits.imminent_exit


def swelling(now: Situation) -> bool:
    """Return whether the layers below the head move the logits more and more.

    Behind a LayerNorm the head hardly moves; there the movement by those layers grows.  Each minibatch has
    another mean row, which moves the logits anyway.  So the movement must also have grown."""
    signals, limits = now.signals, now.limits
    factor = 0.25 if now.on(Imminent.name) else now.level_of(Imminent.name)
    return signals.swing >= factor * limits.imminent_exit and signals.swell >= factor * limits.imminent_swell
