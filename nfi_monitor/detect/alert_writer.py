"""What an alert says beside its kind: evidence, forecast and advice, from the rules that are on."""

from __future__ import annotations

from dataclasses import replace

from nfi_monitor.detect.advice import advice_for
from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.rules.base import finite
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import Alert, AlertKind, Evidence, Mechanism, Severity

_LASTING = {level.quantity for rule in RULES for level in rule.levels if level.keeps_lowest}


class AlertWriter:
    """Write the parts of an alert from the detector's situation."""

    def __init__(self, now: Situation) -> None:
        self._now = now

    @property
    def origin(self) -> tuple[str | None, int]:
        """The (layer, rank) that an alert is about."""
        return self._now.context.layer, self._now.context.rank

    def evidence(self, kind: AlertKind) -> dict[str, Evidence]:
        """Return what an alert of ``kind`` rests on, quantity by quantity.

        Every rule's signals stand beside their usual levels.  A rule that is on replaces them by the levels
        that it asked for.
        """
        now = self._now
        for rule in RULES:
            if rule.anytime and kind in rule.holds:
                return rule.claims(now, kind)
        items: dict[str, Evidence] = {}
        claimed: dict[str, Evidence] = {}
        for rule in RULES:  # of each quantity the first rule that speaks
            items = items | {name: item for name, item in rule.evidence(now).items() if name not in items}
            if now.on(rule.name) and not rule.anytime:
                claims = rule.claims(now, kind)
                claimed = claimed | {name: item for name, item in claims.items() if name not in claimed}
        items |= claimed
        if kind is AlertKind.SLINGSHOT:
            spike = now.spike
            items["loss"] = Evidence(spike.peak, spike.height, spike.floor)
            items["loss_afterwards"] = Evidence(spike.stayed, spike.level, spike.floor)
        return finite(items)

    def renewed(self, alert: Alert) -> dict[str, Evidence]:
        """Return the evidence of an alert that goes on.

        Where the alert began with a lower threshold, that threshold is kept.
        """
        new = self.evidence(alert.kind)
        for name in _LASTING & new.keys() & alert.evidence.keys():
            levels = (new[name].threshold, alert.evidence[name].threshold)
            new[name] = replace(new[name], threshold=min(x for x in levels if x is not None))
        return new

    def forecast(self, kind: AlertKind, mechanism: Mechanism) -> tuple[int, int, int] | None:
        """Return (low, median, high) steps left, or None where no rule gives a number.

        Asked are the rules of the mechanism that are on, in their order.
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
        """Return what to do, in the order to try it."""
        return advice_for(kind, mechanism, self._now.context.tau, severity)
