"""Judge readings: the state machine that turns readings into a phase and alerts.

The detector smooths a reading into signals.  Then it updates the switch of every rule of
:data:`~nfi_monitor.detect.rules.RULES`.  The alert book begins, updates and ends alerts.  The loss decides
whether a slingshot is under way (:mod:`~nfi_monitor.detect.spike`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nfi_monitor.detect.alert_book import AlertBook, Claim
from nfi_monitor.detect.alert_writer import AlertWriter
from nfi_monitor.detect.approach import causes_now
from nfi_monitor.detect.attention import Attention, attention_of
from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.loss_watch import LossWatch
from nfi_monitor.detect.mechanism import name_mechanism, outside_cause, raised_by_data, with_outside
from nfi_monitor.detect.outside import Outside, OutsideWatch, moved_by
from nfi_monitor.detect.record import Record
from nfi_monitor.detect.rules import ANYTIME_RULES, PROVEN, RULES, WARNING_RULES, Rule
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import FALLEN, QUIET, SpikeDetector
from nfi_monitor.detect.trial import try_out
from nfi_monitor.types import Alert, AlertKind, Outcome, Phase, Reading, Severity, Thresholds

_PHASES = list(Phase)
_WARNINGS = (AlertKind.AT_RISK, AlertKind.IMMINENT)


class Detector:
    """Judge readings, which must come in the order of their steps.

    ``phase`` and ``alerts`` are the result.
    """

    def __init__(self, thresholds: Thresholds | None = None, context: RunContext | None = None) -> None:
        self.limits = thresholds or Thresholds()
        self.phase = Phase.HEALTHY
        self.signals = Signals()
        self.spike = SpikeDetector()
        self.loss_watch = LossWatch()
        self.outside = OutsideWatch()
        self._switches = {rule.name: Hysteresis() for rule in RULES}
        self.record = Record()
        self._now = Situation(
            self.limits, context or RunContext(), self.signals, self.spike, self._switches, self.record
        )
        self._book = AlertBook(AlertWriter(self._now))
        self._loss_reported = False
        self._causes: Causes | None = None  # of the last reading outside of a rise; None: not asked for yet

    @property
    def context(self) -> RunContext:
        """What the detector knows about the run besides its readings; may change between readings."""
        return self._now.context

    @context.setter
    def context(self, context: RunContext) -> None:
        if context is not self._now.context and context != self._now.context:
            self._last_causes()  # they are those of the context so far
            self._now.context = context

    @property
    def alerts(self) -> list[Alert]:
        """All alerts, oldest first; always the same list object."""
        return self._book.alerts

    @property
    def attention(self) -> Attention:
        """How many of the next steps should be read."""
        return Attention.ALWAYS if self._loss_unusual else self._attention

    @property
    def only_loss_unusual(self) -> bool:
        """Whether an unusual loss is the only reason to read the next steps."""
        return self._loss_unusual and self._attention.is_calm

    @property
    def _loss_unusual(self) -> bool:
        return self.spike.streak > 0 or self.loss_watch.step < self.loss_watch.until

    @property
    def _attention(self) -> Attention:
        return attention_of(self.phase, self._book, self._now)

    @property
    def at_risk(self) -> bool:
        """Whether an *at risk* or *imminent* alert fires."""
        return any(self._book.firing(kind) is not None for kind in _WARNINGS)

    def run_ended(self, step: int) -> list[Alert]:
        """Mark the firing alerts as still firing when the run ended at ``step``; return them."""
        return self._book.run_ended(step)

    def is_unusual(self, step: int, loss: float) -> bool:
        """Record a loss as soon as it is known; return whether it is a reason to read the next steps."""
        self.outside.update_loss(step, loss)
        return self.loss_watch.update(step, loss, self.limits, self.spike.baseline.unit)

    def update_rates(self, step: int, rates: Sequence[float]) -> None:
        """Record the learning rates of an optimizer step, one for each parameter group."""
        self.outside.update_rates(step, rates)

    def forget_losses(self) -> None:
        """Forget the losses so far: nobody trains on them."""
        self._loss_reported = False
        self.spike = self._now.spike = SpikeDetector()
        self.loss_watch, self.outside = LossWatch(), OutsideWatch()

    def absorb_ordinary_loss(self, step: int, loss: float) -> bool:
        """Add an ordinary loss to the running average; call :meth:`is_unusual` with it first.

        Returns False, and adds nothing, for a loss that :meth:`update` must judge.
        """
        if not 0.0 <= loss < self.spike.usual_below(self.limits):
            return False
        self._loss_reported = True
        self._judge_loss(step, loss)
        return True

    def update(self, reading: Reading) -> Judgement:
        """Judge one reading."""
        old_state, tau = self.spike.state, self._now.context.tau
        # Between full readings only the loss is known. It only shows whether it left its floor.
        only_loss = len(reading.values) == 1 and "loss" in reading.values
        if not only_loss:
            broken = self.signals.broken_by_design
            self.spike.baseline.find_kind(reading, no_classes=self.context.no_classes, broken=broken)
        loss = self._loss_of(reading)
        state = self._judge_loss(reading.step, loss)
        if only_loss and old_state == state == QUIET and math.isfinite(loss):
            return Judgement(self.phase)
        if state != QUIET or self.spike.streak:
            self._last_causes()  # before this reading changes the signals
        derived: dict[str, float] = {}
        if not only_loss:
            derived = self.signals.update(reading, tau, self.limits)
            if state == QUIET and self.spike.streak == 0:
                per_loss, bits = self._is_cross_entropy, self._now.context.loss_bits
                self.outside.update(reading, moved_by(reading), per_loss=per_loss, loss_bits=bits)
            self.outside.remember(reading)
        judgement = Judgement(self.phase, derived=derived)
        self._now.reading = reading
        self._now.raised_from_outside = self.outside.raised(reading.step, tau)
        for rule in ANYTIME_RULES:
            self._update_anytime(rule, judgement)
        if state != QUIET:
            self._update_slingshot(state, began=old_state == QUIET, judgement=judgement)
        else:
            if old_state != QUIET:
                self._end_slingshot(judgement)
            causes = self._update_warnings(judgement)
            # A slingshot's cause is read from the reading before it. In the spike itself rows are no longer
            # absorbed, and RMS_t is high whatever the cause is.
            if self.spike.streak == 0:
                self._causes = causes
        self.phase = judgement.phase
        return judgement

    def _loss_of(self, reading: Reading) -> float:
        """Return the loss to judge: the reported loss, or else the loss recovered at the head.

        Once the user reports a loss, never fall back to the head's loss.  The two differ if the user's loss
        has penalties or class weights.
        """
        self._loss_reported = self._loss_reported or "loss" in reading.values
        loss = reading.get("loss")
        self.is_unusual(reading.step, loss)
        signals = self.signals
        other = "mismatch_fraction" in reading.values or signals.broken_by_design or signals.logits_scaled
        if not (self._loss_reported or other):
            loss = reading.get("head_loss")
            self.outside.update_loss(reading.step, loss)
        return loss

    def _judge_loss(self, step: int, loss: float) -> str:
        same_rows = self.signals.same_rows
        return self.spike.update(step, loss, self.context.tau, self.limits, same_rows=same_rows)

    @property
    def _is_cross_entropy(self) -> bool:
        """Whether rows were seen, and nothing shows that the loss is no cross-entropy."""
        signals = self.signals
        return not (self.context.no_classes or signals.broken_by_design) and math.isfinite(signals.violation)

    def _update_anytime(self, rule: Rule, judgement: Judgement) -> None:
        """Update the switch of a rule with ``anytime``, and begin, keep or end its alerts."""
        now, step = self._now, self._now.step
        enters = rule.enter(now)
        on = self._switches[rule.name].update(step, enters, rule.stay(now))
        for kind in rule.holds:
            if not on:
                self._book.end(kind, step, judgement)
            elif enters:
                severity = rule.severity(kind, now)
                claim = Claim(kind, severity, rule.mechanism, rule.confidence, develops=False)
                self._book.hold(claim, step, judgement)

    def _update_slingshot(self, state: str, *, began: bool, judgement: Judgement) -> None:
        """Set the phase within a slingshot; begin the slingshot's alert if it ``began`` at this reading."""
        step, spike = self._now.step, self.spike
        # The loss of a slingshot crosses its level many times. A few steps below it are no recovery yet.
        recovering = state == FALLEN and step - spike.fallen_at >= min(0.25 * self.context.tau, 12.0)
        judgement.phase = Phase.RECOVERING if recovering else Phase.SLINGSHOT
        if not began:
            return
        causes = self._last_causes()
        if causes.step < spike.start - 1:  # the update right before the event was not read
            causes = replace(causes, update_jump=math.nan)
        causes = with_outside(causes, self.outside, self._switches, spike.start, self.context.tau)
        from_outside = outside_cause(causes) > 0
        if self._book.firing(AlertKind.AT_RISK) is not None and not from_outside:
            # A warning that would begin at the same reading goes first.
            phase = judgement.phase
            self._update_warnings(judgement)
            judgement.phase = phase
        self._now.outside = causes.outside
        mechanism, confidence = name_mechanism(causes)
        for kind in _WARNINGS:
            # A mechanism that was named during the build-up with more confidence replaces this one.
            warning = self._book.firing(kind)
            inferred = mechanism not in PROVEN and not from_outside
            if warning is not None and warning.confidence > confidence and inferred:
                mechanism, confidence = warning.mechanism, warning.confidence
            self._book.end(kind, step, judgement, outcome=(Outcome.SLINGSHOT, spike.start))
        # Begin the alert before the rules are switched off, because their levels are its evidence.
        by_data = from_outside and raised_by_data(causes)
        severity = Severity.WARNING if by_data else Severity.CRITICAL
        claim = Claim(AlertKind.SLINGSHOT, severity, mechanism, confidence)
        self._book.begin(claim, spike.start, judgement)
        for rule in WARNING_RULES:
            self._switches[rule.name].on = False
        self.record.slingshot(spike.start, self.context.tau)
        self._now.movement.forget()
        self.signals.restart()

    def _end_slingshot(self, judgement: Judgement) -> None:
        """End the slingshot's alert and reset the signals' peaks."""
        self._book.end(AlertKind.SLINGSHOT, self.spike.fallen_at, judgement)
        self.signals.calm()

    def _update_warnings(self, judgement: Judgement) -> Causes | None:
        """Update the rules' switches, in the order of ``RULES``, then the alerts *at risk* and *imminent*.

        Returns the signals that name a cause; None if nothing fires: then nothing has asked for them.
        """
        now, step = self._now, self._now.step
        on: list[Rule] = []
        for rule in WARNING_RULES:
            switch = self._switches[rule.name]
            if switch.turn(step, rule.stay(now) if switch.on else rule.enter(now)):
                on.append(rule)
        judgement.phase = max([rule.phase for rule in on], key=_PHASES.index, default=Phase.HEALTHY)
        signals, movement, tau = self.signals, self._now.movement, self.context.tau
        if not (on or self._book):  # nothing begins, and nothing can end
            movement.update(step, (), tau, at_risk=False)
            return None
        causes = self._observe()
        at_risk = [rule for rule in on if AlertKind.AT_RISK in rule.holds]
        moved = (signals.displacement_per_rate, signals.swing)
        movement.update(step, moved, tau, at_risk=bool(at_risk))
        for kind in _WARNINGS:
            holding = [rule for rule in on if kind in rule.holds]
            if kind is AlertKind.AT_RISK and movement.is_resting(step, tau):
                holding = []
            outcome = self._outcome(kind)
            if holding:
                self._book.hold(self._claim(kind, holding, causes), step, judgement)
            else:
                self._book.end(kind, step, judgement, outcome=outcome)
            # A rule with two kinds is judged by the more severe one.
            names = [rule.name for rule in holding if max(rule.holds, key=_WARNINGS.index) is kind]
            burst = outcome[0] is Outcome.BURST
            self.record.update(kind, names, step, tau, loss=now.loss, burst=burst)
        return causes

    def _outcome(self, kind: AlertKind) -> tuple[Outcome, int | None]:
        """Return what followed a warning that ends without a slingshot, and the step at which that began."""
        warning, spike = self._book.firing(kind), self.spike
        if warning is not None and spike.burst_start >= max(warning.first_step, 1):
            return Outcome.BURST, spike.burst_start
        return Outcome.PASSED, None

    def _claim(self, kind: AlertKind, holding: list[Rule], causes: Causes) -> Claim:
        """Return what the rules in ``holding`` require: the highest severity, a proven mechanism first."""
        severity = max((rule.severity(kind, self._now) for rule in holding), key=lambda level: level.rank)
        if kind is AlertKind.AT_RISK:  # a state of the run, whatever came from outside
            causes = replace(causes, outside=Outside(), learning_rate_jump=math.nan)
        mechanism, confidence = name_mechanism(causes)
        proven = next((rule.mechanism for rule in holding if rule.proves), mechanism)
        if kind is AlertKind.IMMINENT and outside_cause(causes):
            return Claim(kind, severity, mechanism, confidence)
        if mechanism is not proven:
            # By hysteresis, a rule stays on below the level at which its mechanism is named.
            mechanism, confidence = proven, 0.5
        if kind is AlertKind.AT_RISK and self._now.still:
            moved_at = self._now.movement.moved_at
            return Claim(kind, Severity.INFO, mechanism, confidence, may_lower=True, unmoved_since=moved_at)
        return Claim(kind, severity, mechanism, confidence)

    def _last_causes(self) -> Causes:
        """Return the signals of the last reading outside of a rise, which name the cause of what follows."""
        if self._causes is None:
            self._causes = self._observe()
        return self._causes

    def _observe(self) -> Causes:
        """Return the present signals in the form that names a mechanism."""
        # A leap of the loss is an event itself, and no sign of one to come.
        tau, next_step = self._now.context.tau, self.signals.last_step + 1
        self._now.outside = self.outside.before(next_step, tau, leap=False)
        return causes_now(self._now)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types, which JSON and torch.save both keep."""
        return {
            "phase": self.phase.value,
            **self._book.state_dict(),
            "signals": self.signals.state_dict(),
            "spike": self.spike.state_dict(),
            "loss_watch": self.loss_watch.state_dict(),
            "outside": self.outside.state_dict(),
            "switches": {name: switch.state_dict() for name, switch in self._switches.items()},
            "loss_reported": self._loss_reported,
            "causes": self._last_causes().state_dict(),
            "record": self.record.state_dict(),
            "movement": self._now.movement.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, also in version 0.1 or before a rule existed.

        Raises ValueError for another state, and leaves the detector as it was.
        """
        trial, fresh = (Detector(self.limits, self.context) for _ in range(2))
        try:
            for one in (trial, fresh):
                one._restore(state)
            try_out(trial)
        except Exception as error:
            raise ValueError(f"Not a detector's state ({type(error).__name__}: {error}).") from error
        self._book.alerts[:] = fresh.alerts  # always the same list object
        fresh._book.alerts = self._book.alerts
        vars(self).update(vars(fresh))

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Restore a new detector; a wrong state may leave it half restored."""
        self.phase = Phase(state["phase"])
        self._book.load_state_dict(state)
        self.signals.load_state_dict(state["signals"])
        self.spike.load_state_dict(state["spike"])
        loss_watch = state.get("loss_watch", state.get("unrest"))  # "unrest": the key in version 0.1
        if loss_watch is not None:
            self.loss_watch.load_state_dict(loss_watch)
        self.outside.load_state_dict(state.get("outside", {}))
        for rule in RULES:
            self._load_switch(rule, state["switches"])
        self._loss_reported = bool(state.get("loss_reported", state.get("told")))
        self._causes = Causes.from_state(state["causes"])
        if "record" in state:
            self.record.load_state_dict(state["record"])
            self._now.movement.load_state_dict(state["movement"])

    def _load_switch(self, rule: Rule, saved: Mapping[str, Any]) -> None:
        """Restore the switch of one rule. A rule that is missing in the checkpoint begins switched off.

        Exception: it begins switched on if an alert fires whose kind only this rule holds."""
        switch = self._switches[rule.name]
        state = saved.get(rule.name, saved.get(f"_{rule.name}"))  # version 0.1 wrote an underscore first
        if state is not None:
            return switch.load_state_dict(state)
        others = {kind for other in RULES if other is not rule for kind in other.holds}
        firing = (self._book.firing(kind) for kind in rule.holds if kind not in others)
        switch.on, switch.since = any(alert is not None for alert in firing), 0


def __getattr__(name: str) -> Any:
    new = {"Context": RunContext, "Verdict": Judgement}.get(name)
    if new is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"detector.{name} is now {new.__module__}.{new.__name__}."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return new
