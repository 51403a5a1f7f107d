"""Make an alert's evidence, forecast and advice from the rules that are on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from nfi_monitor.detect.advice import advice_for
from nfi_monitor.detect.outside import BURST, JUMP
from nfi_monitor.detect.rules import ANYTIME_RULES, LEVELS, RULES, WARNING_RULES, Rule
from nfi_monitor.detect.rules.base import compared, finite
from nfi_monitor.detect.rules.numeric import Inflating
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Severity


class AlertWriter:
    """Make the parts of an alert from the detector's situation."""

    def __init__(self, now: Situation) -> None:
        self._now = now

    @property
    def origin(self) -> tuple[str | None, int]:
        """(layer, rank) of the alerts."""
        return self._now.context.layer, self._now.context.rank

    @property
    def tau(self) -> float:
        """Time constant τ of the second moment, in optimizer steps."""
        return self._now.context.tau

    def evidence(self, kind: AlertKind) -> dict[str, Evidence]:
        """Return the evidence of an alert of ``kind`` at this reading, by quantity.

        What the rules that are on claim comes first, the rule nearest to the event before the others, with
        the thresholds that these rules applied.  Then come the signals of all rules with their usual
        thresholds.  Items that have not crossed their thresholds are last.
        """
        now = self._now
        for rule in ANYTIME_RULES:
            if kind in rule.holds:
                return _crossed_first(self._compared(rule, rule.claims(now, kind)))
        usual: dict[str, Evidence] = {}
        claimed: dict[str, Evidence] = {}
        order: dict[str, None] = {}  # an ordered set of names
        for rule in WARNING_RULES:  # if several rules give a quantity, the first rule counts
            signals = self._compared(rule, rule.evidence(now))
            usual = signals | usual
            if now.on(rule.name):
                claims = self._compared(rule, rule.claims(now, kind))
                claimed = claims | claimed
                order = dict.fromkeys((*claims, *signals, *order))
        items = usual | claimed
        items = {name: items[name] for name in dict.fromkeys((*order, *items))}
        if kind is AlertKind.SLINGSHOT:
            items |= self.loss()
        if kind is AlertKind.IMMINENT:
            items |= self._earlier_alarms()
        return _crossed_first(finite(items))

    def _earlier_alarms(self) -> dict[str, Evidence]:
        """Return how many earlier alarms of the rules that are on led to nothing, and how many came true."""
        record = self._now.record
        on = [rule.name for rule in WARNING_RULES if self._now.on(rule.name)]
        false = sum(record.led_to_nothing.get(name, 0) for name in on)
        if not false:
            return {}
        true = sum(record.came_true.get(name, 0) for name in on)
        return {"earlier_false_alarms": Evidence(float(false), None, float(true))}

    def loss(self) -> dict[str, Evidence]:
        """Return the loss of the event, now, against the level that it crossed and its floor before.

        Also return the loss at which it stayed, if the event ended without a recovery."""
        spike, step = self._now.spike, self._now.step
        items = {
            "loss": Evidence(spike.peak, spike.height, spike.floor, crossed=True, step=step),
            "loss_afterwards": Evidence(spike.stayed, spike.level, spike.floor, step=step),
        }
        return finite(items)

    def values(self, kind: AlertKind) -> dict[str, float]:
        """Return the values of :meth:`evidence`, without the thresholds: quick, for each reading."""
        now = self._now
        for rule in ANYTIME_RULES:
            if kind in rule.holds:
                return {name: item.value for name, item in rule.claims(now, kind).items()}
        usual: dict[str, float] = {}
        claimed: dict[str, float] = {}
        for rule in WARNING_RULES:
            for name, item in rule.evidence(now).items():
                usual.setdefault(name, item.value)
            if now.on(rule.name):
                for name, item in rule.claims(now, kind).items():
                    claimed.setdefault(name, item.value)
        return usual | claimed

    def _compared(self, rule: Rule, items: Mapping[str, Evidence]) -> dict[str, Evidence]:
        """Return the items with this step, and with whether each has crossed its threshold."""
        step = self._now.step
        return {
            name: replace(compared(item, below=item.below or _is_below(rule, name)), step=step)
            for name, item in items.items()
        }

    def rule(self, kind: AlertKind, mechanism: Mechanism) -> str:
        """Return the name of the rule that describes an alert; empty if none of the mechanism is on.

        Of several rules, a rule with a label for ``kind`` is preferred, then the rule nearest to the event.
        """
        on = [
            rule
            for rule in RULES
            if rule.mechanism is mechanism
            and self._now.on(rule.name)
            and (kind in rule.holds or not rule.anytime)
        ]
        labelled = [rule for rule in on if kind in rule.labels]
        return next((rule.name for rule in reversed(labelled or on)), "")

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
            found = [key for bits, key in by_bits.items() if bits == now.context.loss_bits]
            return found or ["numeric, growing"] * now.on(Inflating.name)
        if mechanism is Mechanism.UNKNOWN and now.context.every_step:
            return ["unknown, every step read"]
        if mechanism is Mechanism.EXTERNAL:
            outside, jump = now.outside, now.signals.learning_rate_jump
            signs = {
                "outside, rate": outside.rate_jump >= JUMP or jump >= JUMP,
                "outside, gradient": not outside.unexplained_leap
                and (outside.burst >= BURST or outside.outgrown),
                "outside, batch": outside.unexplained_leap,
            }
            return [key for key, shown in signs.items() if shown]
        return []


def _crossed_first(items: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Return the items with those that have not crossed their thresholds last."""
    return dict(sorted(items.items(), key=lambda entry: entry[1].crossed is False))


@cache
def _is_below(rule: Rule, quantity: str) -> bool:
    """Return whether low values of a quantity are the sign, by the rule's own level, or else by any level."""
    own = [level for level in rule.levels if level.quantity == quantity]
    levels = own or [level for level in LEVELS if level.quantity == quantity]
    return bool(levels) and levels[0].below
