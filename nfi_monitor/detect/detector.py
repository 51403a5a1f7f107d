"""The state machine: readings in, phase and alerts out.

Numeric slingshots come in stages, each a state with hysteresis: absorbing → inflating → imminent →
slingshot → recovering.  Slingshots of other mechanisms show in RMS_t, the optimizer lagging behind its
gradient.  One event is one alert that begins, is updated and ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

from nfi_monitor.detect.advice import NON_FINITE, NON_FINITE_LOSS, advice_for
from nfi_monitor.detect.forecast import steps_to_spike
from nfi_monitor.detect.loss_watch import LossWatch
from nfi_monitor.detect.mechanism import FORGOTTEN, LEARNED, Causes, name_mechanism
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import FALLEN, MEMORY, QUIET, SpikeDetector
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Change,
    Evidence,
    Mechanism,
    Phase,
    Reading,
    Severity,
    Thresholds,
)  # fmt: skip

Told = TypeVar("Told")


@dataclass(frozen=True)
class Context:
    """What the detector knows of the run besides its readings."""

    beta1: float = 0.9
    beta2: float = 0.999
    decoupled_decay: bool = False  # AdamW-style weight decay is on
    no_classes: bool = False  # the head has one output
    layer: str | None = None
    rank: int = 0

    @property
    def tau(self) -> float:
        return 1.0 / max(1.0 - self.beta2, 1e-9)

    @property
    def stability_limit(self) -> float:
        """Curvature above which Adam oscillates: 2(1+β1)/(1−β1) (Cohen et al. 2022, arXiv 2207.14484)."""
        return 2.0 * (1.0 + self.beta1) / (1.0 - self.beta1)


class Attention(Enum):
    """How closely the detector wants to look."""

    RARELY = "rarely"
    OFTEN = "often"
    ALWAYS = "always"


@dataclass
class Verdict:
    """What one reading led to."""

    phase: Phase
    changes: list[tuple[Change, Alert]] = field(default_factory=list)
    derived: dict[str, float] = field(default_factory=dict)
    failed: list[tuple[str, Exception]] = field(default_factory=list)
    """What could not be said with an alert, and why."""


class Detector:
    """Feed it readings in order of their steps; ask ``phase`` and ``alerts``."""

    def __init__(self, thresholds: Thresholds | None = None, context: Context | None = None) -> None:
        self.limits = thresholds or Thresholds()
        self.context = context or Context()
        self.phase = Phase.HEALTHY
        self.alerts: list[Alert] = []
        self.signals = Signals()
        self.spike = SpikeDetector()
        self.unrest = LossWatch()
        self._absorbing, self._inflating, self._imminent = Hysteresis(), Hysteresis(), Hysteresis()
        self._coasting, self._kicking, self._swinging = Hysteresis(), Hysteresis(), Hysteresis()
        self._firing: dict[AlertKind, int] = {}  # kind → index into alerts
        self._counts: dict[str, int] = {}
        self._told = False  # a loss was observed
        self._causes = self._observe()

    @property
    def attention(self) -> Attention:
        """How closely the next steps should be read."""
        return Attention.ALWAYS if self.unrest.step < self.unrest.until else self._attention

    @property
    def stirred(self) -> bool:
        """Whether nothing but an unusual loss calls for the next steps."""
        return self.unrest.step < self.unrest.until and self._attention is Attention.RARELY

    @property
    def _attention(self) -> Attention:
        """The loss's stirrings left aside."""
        if self.phase is Phase.HEALTHY and not self._firing and not self._stirring:
            return Attention.RARELY
        # Absorbing alone may last for the rest of a run and leads to nothing within τ.
        calm = self.phase is Phase.ABSORBING and not self._displacing
        # Of a loss that is not finite the next reading tells whether the weights are.
        calm = calm and AlertKind.NON_FINITE not in self._firing
        return Attention.OFTEN if calm else Attention.ALWAYS

    @property
    def at_risk(self) -> bool:
        """Whether something that precedes a slingshot is there now, and no slingshot."""
        return AlertKind.AT_RISK in self._firing or AlertKind.IMMINENT in self._firing

    def stirs(self, step: int, loss: float) -> bool:
        """Look at a loss as soon as it is known: whether it calls for closer attention."""
        return self.unrest.update(step, loss, self.limits)

    def absorb_ordinary_loss(self, step: int, loss: float) -> bool:
        """Take in a loss that begins nothing, and that :meth:`stirs` has seen. False: it is one for
        :meth:`update`, and was not taken in."""
        if not 0.0 <= loss < self.spike.usual_below(self.limits):
            return False
        self._told = True
        self.spike.update(step, loss, self.context.tau, self.limits)
        return True

    def update(self, reading: Reading) -> Verdict:
        """Judge one reading."""
        tau, limits = self.context.tau, self.limits
        was = self.spike.state
        # What is told and what the head shows differ (penalties, weights): once told, never the other.
        self._told = self._told or "loss" in reading.values
        loss = reading.get("loss")
        self.stirs(reading.step, loss)
        if not self._told and not self.signals.broken_by_design:
            loss = reading.get("head_loss")
        state = self.spike.update(reading.step, loss, tau, limits)
        # Between readings the loss comes alone: all it can tell is whether it left its floor.
        alone = len(reading.values) == 1 and "loss" in reading.values
        if alone and was == state == QUIET and math.isfinite(loss):
            return Verdict(self.phase)
        derived = {} if alone else self.signals.update(reading, tau, limits)
        verdict = Verdict(self.phase, derived=derived)
        self._non_finite(reading, verdict)
        if state != QUIET:
            self._in_slingshot(reading.step, state, began=was == QUIET, verdict=verdict)
        else:
            if was != QUIET:
                self._end(AlertKind.SLINGSHOT, reading.step, verdict)
                self.signals.calm()
            self._between(reading.step, verdict)
            # A slingshot's cause is read from the reading before it: in the spike itself rows are no
            # longer absorbed, and RMS_t is high whatever the reason.
            if self.spike.streak == 0:
                self._causes = self._observe()
        verdict.phase = self.phase
        return verdict

    # --- stages --------------------------------------------------------------------------------

    def _in_slingshot(self, step: int, state: str, *, began: bool, verdict: Verdict) -> None:
        # The loss of a slingshot crosses its level many times: a few steps below it are no recovery yet.
        calm = state == FALLEN and step - self.spike.fallen_at >= min(0.25 * self.context.tau, 12.0)
        self.phase = Phase.RECOVERING if calm else Phase.SLINGSHOT
        if not began:
            return
        causes = self._causes
        if causes.step < self.spike.start - 1:  # the update right before the event was not seen
            causes = replace(causes, update_jump=math.nan)
        mechanism, confidence = name_mechanism(causes)
        for kind in (AlertKind.AT_RISK, AlertKind.IMMINENT):
            # A cause that was named while it built up outweighs what the last step before shows.
            index = self._firing.get(kind)
            numeric = mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
            if index is not None and self.alerts[index].confidence > confidence and not numeric:
                mechanism, confidence = self.alerts[index].mechanism, self.alerts[index].confidence
            self._end(kind, step, verdict)
        # Before its grounds are wiped: they are its evidence.
        self._begin(AlertKind.SLINGSHOT, Severity.CRITICAL, self.spike.start, mechanism, confidence, verdict)
        for name in _SWITCHES:
            getattr(self, name).on = False
        self.signals.restart()

    def _between(self, step: int, verdict: Verdict) -> None:
        limits, signals, tau = self.limits, self.signals, self.context.tau
        violation, growth = signals.violation, signals.growth * tau
        absorbing = self._absorbing.update(
            step, violation >= limits.absorbing_enter, violation >= limits.absorbing_exit
        )
        inflating = self._inflating.update(
            step,
            absorbing and growth >= limits.inflating_growth,
            absorbing and growth >= 0.5 * limits.inflating_growth,
        )
        imminent = self._imminent.update(
            step,
            absorbing
            and growth >= limits.imminent_growth
            and (signals.displacement >= self._displacement_level or self._swelling),
            absorbing and (self._displacing or self._swelling),
        )
        coasting, kicking = self._second_moment(step, numeric=absorbing)
        kicking = self._oscillation(step, numeric=absorbing) or kicking

        if imminent or kicking:
            self.phase = Phase.IMMINENT
        elif inflating:
            self.phase = Phase.INFLATING
        elif absorbing:
            self.phase = Phase.ABSORBING
        else:
            self.phase = Phase.HEALTHY

        self._hold(
            AlertKind.AT_RISK,
            absorbing or coasting or kicking,
            Severity.WARNING if inflating or imminent else Severity.INFO,
            step,
            verdict,
            numeric=absorbing,
        )
        self._hold(
            AlertKind.IMMINENT,
            imminent or kicking,
            Severity.CRITICAL if imminent else Severity.WARNING,
            step,
            verdict,
            numeric=imminent,
        )

    @property
    def _displacement_level(self) -> float:
        """δ in nats from which on it is *imminent*: a part of the level where δ is on its way from far below.

        Soft-capped logits reach half of the level for ever, between minibatches, and never double.  A run
        that goes on learning from minibatches adds up small updates for ever, too.
        """
        limits, rise = self.limits, self.signals.displacement_rise
        parts = 1.0
        if rise >= limits.imminent_growing:
            parts = limits.imminent_growing
        if rise >= limits.imminent_rise:
            parts = max(parts, self._stretch)
        return limits.imminent_displacement / parts

    @property
    def _displacing(self) -> bool:
        """δ over a twentieth of τ is above where *imminent* ends."""
        signals, limits = self.signals, self.limits
        held = 0.5 if self._imminent.on else 1.0
        risen = signals.displacement_rise >= held * limits.imminent_rise
        return signals.displacement * (self._stretch if risen else 1.0) >= limits.imminent_exit

    @property
    def _stretch(self) -> float:
        """Steps in a twentieth of τ: with a long memory small updates add up before it corrects them."""
        return max(self.context.tau / 20.0, 1.0)

    @property
    def _swelling(self) -> bool:
        """Behind a LayerNorm the head hardly moves: what grows is what the layers below it do to the logits.

        Between minibatches the mean row moves by itself; so it has to have grown, not only to be there.
        """
        signals, limits = self.signals, self.limits
        held = 0.25 if self._imminent.on else 1.0
        return signals.swing >= held * limits.imminent_exit and signals.swell >= held * limits.imminent_swell

    # --- second-moment slingshots ----------------------------------------------------------------

    def _second_moment(self, step: int, *, numeric: bool) -> tuple[bool, bool]:
        """(at risk, imminent). Where rows absorb, RMS_t tells the same story later.

        At risk: *coasting*. The gradient is gone (RMS_t far below 1), the second moment is letting go of
        it, and decoupled weight decay alone moves the weights, towards the place where the gradient
        comes back (W. Wu 2024, section 2.1).  Imminent: RMS_t above 2.3 on a second moment that had let go,
        and the features move.
        """
        limits, signals = self.limits, self.signals
        pulled = not numeric and self._pulled(step)
        forgotten = pulled and signals.decay_lowest <= FORGOTTEN
        coasting = self._coasting.update(
            step,
            forgotten and signals.rms_t_mean <= limits.coasting_enter and signals.shrinkage < 0,
            not numeric and signals.rms_t_mean <= limits.coasting_exit,
        )
        # Where the curvature says the same, RMS_t need not be as high: that wins a step.
        level = self._kick_level if forgotten else limits.rms_t_imminent
        # What is kicked has to move, where that can be seen: a lone tensor's RMS_t is not yet an event.
        moved = not signals.swing < limits.kick_displacement
        # With strong decay the wall is back before anything is forgotten; then the gradient has to turn.
        walled = pulled and self._steep and signals.turn <= -limits.kick_turn
        kicking = self._kicking.update(
            step,
            # On average it had let go: noise around 1 is no kick.
            (forgotten or walled) and moved and signals.rms_t_peak >= level and signals.rms_t_mean <= 1.0,
            not numeric and signals.rms_t_peak >= limits.rms_t_exit,
        )
        return coasting, kicking

    @property
    def _steep(self) -> bool:
        share = self.limits.kick_curvature
        return bool(self.signals.curvature_peak >= share * self.context.stability_limit)

    @property
    def _kick_level(self) -> float:
        """RMS_t of a kick on a second moment that has let go."""
        return self.limits.rms_t_steep if self._steep else self.limits.rms_t_imminent

    def _oscillation(self, step: int, *, numeric: bool) -> bool:
        """Edge of stability: the optimizer overshoots from wall to wall, further each time.

        Successive gradients oppose each other, the curvature along the update is no longer small, and the
        layers below the head swing the logits by a good part of a nat.  Noise of minibatches opposes nothing.
        """
        limits, signals = self.limits, self.signals
        return self._swinging.update(
            step,
            self._has_floor(step)
            and not numeric
            and signals.alignment <= -limits.swing_alignment
            and signals.curvature_peak >= limits.swing_curvature * self.context.stability_limit
            and signals.swing >= limits.swing_displacement,
            not numeric
            and signals.swing >= limits.swing_exit
            # Features may go on moving for hundreds of steps when the gradients have long agreed again.
            and signals.alignment <= -0.5 * limits.swing_alignment,
        )

    def _has_floor(self, step: int) -> bool:
        """Whether the loss has come to where a slingshot would start: it is low, or training is under way.

        On its way down from where it began it oscillates, too, and goes on falling.
        """
        low = self.spike.average <= math.log(self.limits.spike_high)
        settles = (self.limits.second_moment_settles if low else self.limits.swing_settles) * self.context.tau
        return self.spike.readings >= MEMORY and step >= settles

    def _pulled(self, step: int) -> bool:
        """Decoupled decay moves the weights on a second moment that has had the time to learn a gradient.

        In its first steps a bias-corrected second moment is an average over a moving target, no memory.
        """
        return self.context.decoupled_decay and step >= self.limits.second_moment_settles * self.context.tau

    @property
    def _stirring(self) -> bool:
        """Signals half way to a state: read every step, or the state is seen late."""
        signals, limits = self.signals, self.limits
        if signals.violation >= 0.5 * limits.absorbing_exit:
            return True
        if signals.alignment <= -limits.swing_alignment and signals.swing >= limits.swing_exit:
            return True
        rising = signals.rms_t_peak >= 0.5 * limits.rms_t_imminent and signals.rms_t_mean <= 1.0
        return rising and self._pulled(signals.last_step) and signals.decay_lowest <= FORGOTTEN

    @property
    def _gone(self) -> bool:
        """Within the last τ there was next to no gradient, on a second moment that had learned one."""
        step, tau = self.signals.last_step, self.context.tau
        return step >= LEARNED * tau and step - self.signals.gone_at <= tau

    # --- evidence --------------------------------------------------------------------------------

    def _observe(self) -> Causes:
        signals = self.signals
        return Causes(
            step=signals.last_step,
            violation=signals.violation,
            no_classes=self.context.no_classes,
            kicked=self._kicking.on,
            coasting=self._coasting.on,
            gone=self._gone,
            swinging=self._swinging.on,
            decay=signals.decay_lowest,
            curvature=signals.curvature_peak,
            stability_limit=self.context.stability_limit,
            learning_rate_jump=signals.learning_rate_jump,
            update_jump=signals.update_jump,
            rms_t=signals.rms_t_peak,
        )

    def _evidence(self, kind: AlertKind) -> dict[str, Evidence]:
        signals, limits = self.signals, self.limits
        forgotten = signals.decay_lowest <= FORGOTTEN
        kicked = self._kicking.on and forgotten
        # The share of the stability limit that the rule asked for by which it fires.
        share = 1.0
        if self._swinging.on:
            share = limits.swing_curvature
        elif self._kicking.on and self._steep:
            share = limits.kick_curvature
        items = {
            "zero_sum_violation": Evidence(signals.violation, limits.absorbing_enter, 0.0),
            "feature_mean_growth": Evidence(signals.growth, limits.inflating_growth / self.context.tau, 0.0),
            "logit_displacement": Evidence(signals.displacement, self._displacement_level),
            "rms_t_max": Evidence(
                signals.rms_t_peak,
                self._kick_level if kicked else limits.rms_t_imminent,
                signals.rms_t_mean,
            ),
            "second_moment_decay": Evidence(signals.decay_lowest, FORGOTTEN, 0.0),
            "secant_curvature": Evidence(signals.curvature_peak, share * self.context.stability_limit),
            "gradient_alignment": Evidence(signals.alignment, -limits.swing_alignment, 0.0),
            "feature_displacement": Evidence(
                signals.swing,
                limits.imminent_exit if self._imminent.on else limits.swing_displacement,
            ),
        }
        if kind is AlertKind.AT_RISK and self._coasting.on:
            # Here a low RMS_t is the sign, not a high one.
            items["rms_t_max"] = Evidence(signals.rms_t_mean, limits.coasting_enter, 1.0)
        if kind is AlertKind.SLINGSHOT:
            items["loss"] = Evidence(self.spike.peak, self.spike.height, self.spike.floor)
            items["loss_afterwards"] = Evidence(self.spike.stayed, self.spike.level, self.spike.floor)
        return {name: item for name, item in items.items() if math.isfinite(item.value)}

    # --- alerts: begin, update, end ----------------------------------------------------------------

    def _hold(
        self,
        kind: AlertKind,
        active: bool,
        severity: Severity,
        step: int,
        verdict: Verdict,
        *,
        numeric: bool,
    ) -> None:
        """Keep one alert of ``kind`` firing while ``active``; ``numeric``: because rows absorb."""
        if not active:
            self._end(kind, step, verdict)
            return
        mechanism, confidence = name_mechanism(self._observe())
        inflation = Mechanism.NUMERICAL_FEATURE_INFLATION
        if numeric and mechanism is not inflation:
            # Hysteresis keeps a numeric state alive below the level at which it was named.
            mechanism, confidence = inflation, 0.5
        index = self._firing.get(kind)
        if index is None:
            self._begin(kind, severity, step, mechanism, confidence, verdict)
            return
        old = self.alerts[index]
        rises = severity.rank > old.severity.rank
        # The best evidence of the event counts: near the spike the signals of all mechanisms look alike.
        # Rounding, once seen, is proven; the others are inferred.
        firmer = confidence > old.confidence or (mechanism is inflation and old.mechanism is not inflation)
        new = replace(
            old,
            last_step=step,
            phase=self.phase,
            severity=severity if rises else old.severity,
            mechanism=mechanism if firmer else old.mechanism,
            confidence=confidence if firmer else old.confidence,
            evidence=self._tell(verdict, "evidence", old.evidence, self._renewed, old),
            steps_to_spike=self._tell(verdict, "forecast", None, self._forecast, kind, mechanism),
        )
        if rises or new.mechanism is not old.mechanism:
            known = old.advice if new.mechanism is old.mechanism else ()
            new = replace(new, advice=self._tell(verdict, "advice", known, self._advice, kind, new.mechanism))
            verdict.changes.append((Change.UPDATE, new))
        self.alerts[index] = new

    def _begin(
        self,
        kind: AlertKind,
        severity: Severity,
        step: int,
        mechanism: Mechanism,
        confidence: float,
        verdict: Verdict,
    ) -> None:
        self._counts[kind.value] = number = self._counts.get(kind.value, 0) + 1
        alert = Alert(
            id=f"{kind}-{number}",
            kind=kind,
            severity=severity,
            state=AlertState.FIRING,
            phase=self.phase,
            first_step=step,
            last_step=step,
            mechanism=mechanism,
            confidence=confidence,
            evidence=self._tell(verdict, "evidence", {}, self._evidence, kind),
            steps_to_spike=self._tell(verdict, "forecast", None, self._forecast, kind, mechanism),
            advice=self._tell(verdict, "advice", (), self._advice, kind, mechanism),
            layer=self.context.layer,
            rank=self.context.rank,
        )
        self._firing[kind] = len(self.alerts)
        self.alerts.append(alert)
        verdict.changes.append((Change.BEGIN, alert))

    def _end(self, kind: AlertKind, step: int, verdict: Verdict) -> None:
        index = self._firing.pop(kind, None)
        if index is None:
            return
        last = self.spike.fallen_at if kind is AlertKind.SLINGSHOT else step
        evidence = dict(self.alerts[index].evidence)
        if kind is AlertKind.SLINGSHOT:
            now: Mapping[str, Evidence] = self._tell(verdict, "evidence", {}, self._evidence, kind)
            evidence |= {name: item for name, item in now.items() if name in ("loss", "loss_afterwards")}
        ended = replace(
            self.alerts[index],
            state=AlertState.RESOLVED,
            last_step=last,
            evidence=evidence,
            steps_to_spike=None,
        )
        self.alerts[index] = ended
        verdict.changes.append((Change.END, ended))

    def _forecast(self, kind: AlertKind, mechanism: Mechanism) -> tuple[int, int, int] | None:
        if kind not in (AlertKind.AT_RISK, AlertKind.IMMINENT):
            return None
        # A countdown without growth would count down to nothing.
        if mechanism is not Mechanism.NUMERICAL_FEATURE_INFLATION or not self._inflating.on:
            return None
        signals, context = self.signals, self.context
        # Where the layers below the head move more than it does, its displacement is not what the slingshot
        # will be made of; and decay takes margins away that the law counts on.
        if signals.swing > signals.head_displacement or context.decoupled_decay:
            return None
        return steps_to_spike(
            signals.displacement_rms * self._stretch,
            signals.violation,
            signals.displacement_slope,
            signals.loss_rise,
            context.beta2,
            context.tau,
        )

    def _renewed(self, alert: Alert) -> Mapping[str, Evidence]:
        return _with_lowest_levels(self._evidence(alert.kind), alert.evidence)

    @staticmethod
    def _tell(
        verdict: Verdict, part: str, otherwise: Told, make: Callable[..., Told], *arguments: object
    ) -> Told:
        """What is told with an alert: where making it fails, the alert is raised without it."""
        try:
            return make(*arguments)
        except Exception as error:
            verdict.failed.append((part, error))
            return otherwise

    def _advice(self, kind: AlertKind, mechanism: Mechanism) -> tuple[str, ...]:
        return advice_for(kind, mechanism, self.context.tau)

    def _non_finite(self, reading: Reading, verdict: Verdict) -> None:
        values = reading.values
        norm = values.get("weight_norm", 0.0)
        spoilt = values.get("non_finite_gradients", 0.0) > 0 or not math.isfinite(norm)
        if not spoilt and math.isfinite(values.get("loss", 0.0)):
            if "non_finite_gradients" in values:
                self._end(AlertKind.NON_FINITE, reading.step, verdict)
            return
        index = self._firing.get(AlertKind.NON_FINITE)
        change = Change.BEGIN
        if index is None:
            self._begin(AlertKind.NON_FINITE, Severity.WARNING, reading.step, Mechanism.UNKNOWN, 0.0, verdict)
            index = self._firing[AlertKind.NON_FINITE]
            verdict.changes.pop()
        elif spoilt and self.alerts[index].severity is not Severity.CRITICAL:
            change = Change.UPDATE
        else:
            self.alerts[index] = replace(self.alerts[index], last_step=reading.step)
            return
        # A mean over no rows is NaN and moves nothing: the loss alone is no reason to go back.
        severity = Severity.CRITICAL if spoilt else Severity.WARNING
        self.alerts[index] = alert = replace(
            self.alerts[index],
            severity=severity,
            last_step=reading.step,
            evidence={
                name: Evidence(values[name], threshold)
                for name, threshold in (("loss", None), ("non_finite_gradients", 0.0), ("weight_norm", None))
                if name in values
            },
            advice=NON_FINITE if spoilt else NON_FINITE_LOSS,
        )
        verdict.changes.append((change, alert))

    # --- resume ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: survives JSON and torch.save alike."""
        return {
            "phase": self.phase.value,
            # to_json writes null for what is not finite; a resume must find it as it was.
            "alerts": [
                alert.to_json() | {"evidence": {name: asdict(item) for name, item in alert.evidence.items()}}
                for alert in self.alerts
            ],
            "signals": self.signals.state_dict(),
            "spike": self.spike.state_dict(),
            "unrest": self.unrest.state_dict(),
            "switches": {name: getattr(self, name).state_dict() for name in _SWITCHES},
            "firing": {kind.value: index for kind, index in self._firing.items()},
            "counts": dict(self._counts),
            "told": self._told,
            "causes": self._causes.__dict__.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phase = Phase(state["phase"])
        self.alerts[:] = [Alert.from_json(record) for record in state["alerts"]]
        self.signals.load_state_dict(state["signals"])
        self.spike.load_state_dict(state["spike"])
        if "unrest" in state:
            self.unrest.load_state_dict(state["unrest"])
        for name in _SWITCHES:
            getattr(self, name).load_state_dict(state["switches"][name])
        self._firing = {AlertKind(kind): int(index) for kind, index in state["firing"].items()}
        self._counts = dict(state["counts"])
        self._told = bool(state["told"])
        self._causes = Causes(**{"gone": False, "step": 0, **state["causes"]})


def _with_lowest_levels(new: dict[str, Evidence], old: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """What an alert began by stays what it is held against, though the rule may ask for more by now."""
    for name in ("logit_displacement", "secant_curvature"):
        if name in new and name in old:
            levels = (new[name].threshold, old[name].threshold)
            new[name] = replace(new[name], threshold=min(x for x in levels if x is not None))
    return new


_SWITCHES = ("_absorbing", "_inflating", "_imminent", "_coasting", "_kicking", "_swinging")
