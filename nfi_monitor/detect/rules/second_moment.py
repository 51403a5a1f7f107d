"""Recognize second-moment slingshots: coasting, then a kick (W. Wu 2024, section 2.1; Wortsman et al. 2023).

- Coasting: the gradient has vanished (RMS_t far below 1), so the second moment decays.  Decoupled weight
  decay alone moves the weights, towards the place where the gradient comes back.
- Kicking: the gradient comes back.  RMS_t exceeds 2.3 while the second moment has decayed, and the features
  move.

While rows are absorbed both rules stay off: there RMS_t shows the slingshot as well, but later than the
numeric rules do."""

from __future__ import annotations

from nfi_monitor.detect.causes import FORGOTTEN, Causes
from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.rules.numeric import Absorbing
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Severity

DECAY = Level(
    signal="decay",
    quantity="second_moment_decay",
    enter=lambda limits, context: FORGOTTEN,
    leave=lambda limits, level: FORGOTTEN,
    supports=(Mechanism.SECOND_MOMENT,),
    made_of=("head_sqrt_exp_avg_sq_mean", "sqrt_exp_avg_sq_mean"),
    value=lambda signals, reading, context: signals.decay_lowest,
    below=True,
    label="sqrt(v) against its maximum",
    show="percent of its maximum",
)
RMS_T_MEAN = Level(
    signal="rms_t_mean",
    quantity="rms_t_max",
    enter=lambda limits, context: limits.coasting_enter,
    leave=lambda limits, level: limits.coasting_exit,
    supports=(Mechanism.SECOND_MOMENT,),
    made_of=("rms_t_max",),
    value=lambda signals, reading, context: signals.rms_t_mean,
    below=True,
    label="RMS_t, averaged,",
)
RMS_T = Level(
    signal="rms_t",
    quantity="rms_t_max",
    enter=lambda limits, context: limits.rms_t_imminent,
    leave=lambda limits, level: limits.rms_t_exit,
    supports=(Mechanism.SECOND_MOMENT, Mechanism.EDGE_OF_STABILITY),
    made_of=("rms_t_max",),
    value=lambda signals, reading, context: signals.rms_t,
    may_be_lower=True,
    bands=("rms_t_max",),
    others_up_to=lambda limits, context: limits.rms_t_exit,
)
CURVATURE = Level(
    signal="secant_curvature",
    quantity="secant_curvature",
    enter=lambda limits, context: context.stability_limit,
    leave=lambda limits, level: level,
    supports=(Mechanism.EDGE_OF_STABILITY,),
    made_of=("secant_curvature",),
    value=lambda signals, reading, context: reading.get("secant_curvature"),
    may_be_lower=True,
    bands=("secant_curvature",),
)


class Coasting(Rule):
    """The gradient has vanished, and weight decay alone moves the weights."""

    name = "coasting"
    mechanism = Mechanism.SECOND_MOMENT
    holds = {AlertKind.AT_RISK: Severity.INFO}
    labels = {AlertKind.AT_RISK: "the gradient has vanished and weight decay alone moves the weights"}
    advice = "second_moment"
    charts = ("RMS_t", "second moment, median sqrt(v̂)", "second-moment decay", "weight norms")
    levels = (DECAY, RMS_T_MEAN)
    first_evidence = {AlertKind.AT_RISK: ("rms_t_max", "second_moment_decay")}

    def enter(self, now: Situation) -> bool:
        signals = now.signals
        decayed = now.forgotten and not now.on(Absorbing.name) and now.weight_decay_pulls(now.step)
        return (
            decayed
            and signals.rms_t_mean <= now.limits.coasting_enter / now.level_of(self.name)
            and signals.shrinkage < 0
        )

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and now.signals.rms_t_mean <= now.limits.coasting_exit

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        """Return the averaged RMS_t for *at risk*: here a low RMS_t is the sign, not a high one."""
        if kind is not AlertKind.AT_RISK:
            return {}
        return {"rms_t_max": Evidence(now.signals.rms_t_mean, now.limits.coasting_enter, 1.0)}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return (self.mechanism, 0.8) if causes.forgotten else None


class Kicking(Rule):
    """The gradient comes back after the second moment has decayed."""

    name = "kicking"
    mechanism = Mechanism.SECOND_MOMENT
    holds = {AlertKind.AT_RISK: Severity.INFO, AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {
        AlertKind.IMMINENT: "the gradient is back after the second moment decayed: updates are too large"
    }
    advice = "second_moment"
    charts = ("RMS_t", "curvature along the update")
    levels = (RMS_T, CURVATURE)
    first_evidence = {AlertKind.IMMINENT: ("rms_t_max", "second_moment_decay")}

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        if now.on(Absorbing.name) or not now.weight_decay_pulls(now.step, coupled=True):
            return False
        decayed = now.forgotten
        # Under strong weight decay the gradient comes back before the second moment has decayed. Then the
        # gradient must turn around at high curvature instead.
        turned = now.curvature_is_high and signals.turn <= -limits.kick_turn
        if not (decayed or turned):
            return False
        # If the curvature is high as well, a lower RMS_t is enough: the alert comes one step earlier.
        level = self._level(now, decayed)
        # The features must move, if that is measured: a high RMS_t of one tensor alone is no event.
        moved = not signals.swing < limits.kick_displacement
        # RMS_t must have been at most 1 on average: noise around 1 is no kick.
        kicked = signals.rms_t_peak >= level * now.level_of(self.name) and signals.rms_t_mean <= 1.0
        # Minibatches whose gradients agree move together; a single hard one has a gradient of its own.
        # An update that suits the loss of its own rows follows a change of the data (a new class), no decay.
        agrees = signals.alignment >= limits.kick_agreement
        agree = now.rows_repeat or (agrees and not signals.reduction_peak < limits.overreach_ratio)
        risen = now.loss_stands_out and now.loss_share >= limits.kick_loss
        return moved and kicked and agree and risen

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and now.signals.rms_t_peak >= now.limits.rms_t_exit

    def nears(self, now: Situation) -> bool:
        signals = now.signals
        rising = signals.rms_t_peak >= 0.5 * now.limits.rms_t_imminent and signals.rms_t_mean <= 1.0
        return rising and now.weight_decay_pulls(signals.last_step, coupled=True) and now.forgotten

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        signals, limits = now.signals, now.limits
        return {
            "rms_t_max": Evidence(signals.rms_t_peak, limits.rms_t_imminent, signals.rms_t_mean),
            "second_moment_decay": Evidence(signals.decay_lowest, FORGOTTEN, 0.0),
            "secant_curvature": Evidence(signals.curvature_peak, now.context.stability_limit),
        }

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        signals, limits, claimed = now.signals, now.limits, {}
        if not now.on("swinging"):  # it has a higher level of the same displacement
            claimed["feature_displacement"] = Evidence(signals.swing, limits.kick_displacement)
        if now.curvature_is_high and signals.turn <= -limits.kick_turn:
            claimed["gradient_alignment"] = Evidence(signals.turn, -limits.kick_turn, 0.0, below=True)
        elif not now.rows_repeat:
            agree, level = signals.alignment, limits.kick_agreement
            claimed["gradient_alignment"] = Evidence(agree, level, 0.0, crossed=agree >= level)
        level = self._level(now, now.forgotten) * now.level_of(self.name)
        claimed["rms_t_max"] = Evidence(signals.rms_t_peak, level, signals.rms_t_mean)
        # The rule "swinging" has a lower level of curvature, which is crossed first: keep that one.
        if now.curvature_is_high and not now.on("swinging"):
            share = limits.kick_curvature * now.context.stability_limit
            claimed["secant_curvature"] = Evidence(signals.curvature_peak, share)
        return claimed | now.loss_evidence

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.8)

    @staticmethod
    def _level(now: Situation, decayed: bool) -> float:
        """Return the RMS_t at which a kick begins; ``decayed``: the second moment has decayed."""
        limits = now.limits
        if not now.rows_repeat:  # between two minibatches, the curvature along the update says little
            return limits.rms_t_minibatch
        return limits.rms_t_steep if decayed and now.curvature_is_high else limits.rms_t_imminent


def kick_or_swing(causes: Causes, confidence: float) -> tuple[Mechanism, float]:
    """Return (mechanism, confidence) of an event after a kick or a swing, by what came before it.

    In the last steps both look alike: a kick throws the weights back and forth, a swing refills the second
    moment.  Only a vanished gradient makes the second moment's decay meaningful."""
    if causes.forgotten and causes.gone:
        return Mechanism.SECOND_MOMENT, 0.9
    return Mechanism.EDGE_OF_STABILITY, confidence
