"""Second-moment slingshots: coasting, then a kick (W. Wu 2024, section 2.1; Wortsman et al. 2023).

Coasting: the gradient is gone (RMS_t far below 1), the second moment is letting go of it, and decoupled
weight decay alone moves the weights, towards the place where the gradient comes back.  Kicking: RMS_t above
2.3 on a second moment that had let go, and the features move.  Where rows absorb, RMS_t tells the same
story later."""

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
    lowered=True,
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
    lowered=True,
    keeps_lowest=True,
)


class Coasting(Rule):
    """The gradient is gone, and weight decay alone moves the weights."""

    name = "coasting"
    mechanism = Mechanism.SECOND_MOMENT
    holds = {AlertKind.AT_RISK: Severity.INFO}
    labels = {AlertKind.AT_RISK: "the gradient is gone, weight decay alone moves the weights"}
    advice = "second_moment"
    charts = ("RMS_t", "second moment, median sqrt(v̂)", "second-moment decay", "weight norms")
    levels = (DECAY, RMS_T_MEAN)
    first_evidence = {AlertKind.AT_RISK: ("rms_t_max", "second_moment_decay")}

    def enter(self, now: Situation) -> bool:
        signals = now.signals
        forgotten = not now.on(Absorbing.name) and now.pulled(now.step) and now.forgotten
        return forgotten and signals.rms_t_mean <= now.limits.coasting_enter and signals.shrinkage < 0

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and now.signals.rms_t_mean <= now.limits.coasting_exit

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        """Here a low RMS_t is the sign, not a high one."""
        if kind is not AlertKind.AT_RISK:
            return {}
        return {"rms_t_max": Evidence(now.signals.rms_t_mean, now.limits.coasting_enter, 1.0)}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return (self.mechanism, 0.8) if causes.forgotten else None


class Kicking(Rule):
    """The gradient comes back on a second moment that had let go of it."""

    name = "kicking"
    mechanism = Mechanism.SECOND_MOMENT
    holds = {AlertKind.AT_RISK: Severity.INFO, AlertKind.IMMINENT: Severity.WARNING}
    phase = Phase.IMMINENT
    labels = {AlertKind.IMMINENT: "gradients are back on a second moment that has let go of them"}
    advice = "second_moment"
    charts = ("RMS_t", "curvature along the update")
    levels = (RMS_T, CURVATURE)
    first_evidence = {AlertKind.IMMINENT: ("rms_t_max", "second_moment_decay")}

    def enter(self, now: Situation) -> bool:
        limits, signals = now.limits, now.signals
        pulled = not now.on(Absorbing.name) and now.pulled(now.step)
        forgotten = pulled and now.forgotten
        # Where the curvature says the same, RMS_t need not be as high: that wins a step.
        level = self._level(now) if forgotten else limits.rms_t_imminent
        # What is kicked has to move, where that can be seen: a lone tensor's RMS_t is not yet an event.
        moved = not signals.swing < limits.kick_displacement
        # With strong decay the wall is back before anything is forgotten; then the gradient has to turn.
        walled = pulled and now.steep and signals.turn <= -limits.kick_turn
        # On average it had let go: noise around 1 is no kick.
        return (forgotten or walled) and moved and signals.rms_t_peak >= level and signals.rms_t_mean <= 1.0

    def stay(self, now: Situation) -> bool:
        return not now.on(Absorbing.name) and now.signals.rms_t_peak >= now.limits.rms_t_exit

    def nears(self, now: Situation) -> bool:
        signals = now.signals
        rising = signals.rms_t_peak >= 0.5 * now.limits.rms_t_imminent and signals.rms_t_mean <= 1.0
        return rising and now.pulled(signals.last_step) and now.forgotten

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        signals, limits = now.signals, now.limits
        return {
            "rms_t_max": Evidence(signals.rms_t_peak, limits.rms_t_imminent, signals.rms_t_mean),
            "second_moment_decay": Evidence(signals.decay_lowest, FORGOTTEN, 0.0),
            "secant_curvature": Evidence(signals.curvature_peak, now.context.stability_limit),
        }

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        signals, claimed = now.signals, {}
        if now.forgotten:
            claimed["rms_t_max"] = Evidence(signals.rms_t_peak, self._level(now), signals.rms_t_mean)
        # An oscillation asks for less curvature than a kick does: its level is the one that was crossed
        # first.
        if now.steep and not now.on("swinging"):
            share = now.limits.kick_curvature * now.context.stability_limit
            claimed["secant_curvature"] = Evidence(signals.curvature_peak, share)
        return claimed

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        return kick_or_swing(causes, 0.8)

    @staticmethod
    def _level(now: Situation) -> float:
        """RMS_t of a kick on a second moment that has let go."""
        return now.limits.rms_t_steep if now.steep else now.limits.rms_t_imminent


def kick_or_swing(causes: Causes, confidence: float) -> tuple[Mechanism, float]:
    """Tell a kick from a swing by what came before them.

    In the last steps both look alike: a kick is thrown back and forth, a swing refills the second moment.
    Only a vanished gradient makes the second moment's decay meaningful."""
    if causes.forgotten and causes.gone:
        return Mechanism.SECOND_MOMENT, 0.9
    return Mechanism.EDGE_OF_STABILITY, confidence
