"""Make an alert's evidence, forecast and advice from the rules that are on."""

from __future__ import annotations

import math
from dataclasses import replace

from nfi_monitor.detect.advice import advice_for
from nfi_monitor.detect.outside import BURST, JUMP
from nfi_monitor.detect.rules import ANYTIME_RULES, RULES, WARNING_RULES
from nfi_monitor.detect.rules.base import finite
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import Alert, AlertKind, Evidence, Mechanism, Severity

_KEEPS_LOWEST = {level.quantity for rule in RULES for level in rule.levels if level.keeps_lowest}


class AlertWriter:
    """Make the parts of an alert from the detector's situation."""

    def __init__(self, now: Situation) -> None:
        self._now = now

    @property
    def origin(self) -> tuple[str | None, int]:
        """(layer, rank) of the alerts."""
        return self._now.context.layer, self._now.context.rank

    def evidence(self, kind: AlertKind) -> dict[str, Evidence]:
        """Return the evidence of an alert of ``kind``: quantity → value, threshold and baseline.

        Every rule gives its signals with their usual thresholds.  A rule that is on replaces them by the
        thresholds that it applied.
        """
        now = self._now
        for rule in ANYTIME_RULES:
            if kind in rule.holds:
                return rule.claims(now, kind)
        items: dict[str, Evidence] = {}
        claimed: dict[str, Evidence] = {}
        for rule in WARNING_RULES:  # if several rules give a quantity, the first rule counts
            for name, item in rule.evidence(now).items():
                items.setdefault(name, item)
            if now.switches[rule.name].on:
                for name, item in rule.claims(now, kind).items():
                    claimed.setdefault(name, item)
        items |= claimed
        if kind is AlertKind.SLINGSHOT:
            spike = now.spike
            items["loss"] = Evidence(spike.peak, spike.height, spike.floor)
            items["loss_afterwards"] = Evidence(spike.stayed, spike.level, spike.floor)
        return finite(items)

    def renewed(self, alert: Alert) -> dict[str, Evidence]:
        """Return the present evidence of a firing alert.

        Where the alert began with a lower threshold, keep that threshold.
        """
        new = self.evidence(alert.kind)
        for name in _KEEPS_LOWEST & new.keys() & alert.evidence.keys():
            began, now = alert.evidence[name].threshold, new[name].threshold
            if began is not None and (now is None or began < now):
                new[name] = replace(new[name], threshold=began)
        return new

    def forecast(self, kind: AlertKind, mechanism: Mechanism) -> tuple[int, int, int] | None:
        """Return (low, median, high) optimizer steps left, or None if no rule gives a forecast.

        The forecast is that of the first rule of the mechanism that is on and gives one.
        """
        if kind not in (AlertKind.AT_RISK, AlertKind.IMMINENT):
            return None
        for rule in RULES:
            if rule.mechanism is mechanism and self._now.on(rule.name):
                forecast = rule.forecast(self._now)
                if forecast is not None:
                    return forecast
        return None

    def advice(self, kind: AlertKind, mechanism: Mechanism, severity: Severity) -> tuple[str, ...]:
        """Return the lines of advice, in the order to try them."""
        now = self._now
        rules = [rule.advice for rule in RULES if rule.mechanism is mechanism and now.on(rule.name)]
        keys = [*self._facts(kind, mechanism), *rules]
        return advice_for(kind, mechanism, now.context.tau, severity, keys)

    def _facts(self, kind: AlertKind, mechanism: Mechanism) -> list[str]:
        """Return the advice keys that facts about this run call for, the most specific first."""
        now, reading = self._now, self._now.reading
        if kind is AlertKind.NON_FINITE:
            before = math.isfinite(reading.get("loss", 0.0)) and reading.get("non_finite_gradients") == 0
            spoilt = before and not math.isfinite(reading.get("weight_norm", 0.0))
            return ["non_finite_update"] if spoilt else []
        if mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION:
            by_bits = {16: "numeric, half precision", 64: "numeric, float64"}
            return [key for bits, key in by_bits.items() if bits == now.context.loss_bits]
        if mechanism is Mechanism.UNKNOWN and now.context.every_step:
            return ["unknown, every step read"]
        if mechanism is Mechanism.EXTERNAL:
            outside, jump = now.outside, now.signals.learning_rate_jump
            signs = {
                "outside, rate": outside.rate_jump >= JUMP or jump >= JUMP,
                "outside, gradient": outside.burst >= BURST and not outside.unexplained_leap,
                "outside, batch": outside.unexplained_leap,
            }
            return [key for key, shown in signs.items() if shown]
        return []
