"""List the rules in the order in which the detector updates them; a rule may depend on earlier rules.

Each rule owns its switch, levels, evidence, mechanism, advice, labels and charts.  To add a rule, write its
class into a file of this package and put it into :data:`RULES`.  The tests in ``tests/detect/rules`` name the
missing parts.
"""

from __future__ import annotations

from functools import cache

from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.rules.non_finite import NonFinite
from nfi_monitor.detect.rules.numeric import Absorbing, Imminent, Inflating
from nfi_monitor.detect.rules.oscillation import Diverging, Overshooting, Surging, Swinging
from nfi_monitor.detect.rules.overreach import Overreaching
from nfi_monitor.detect.rules.second_moment import Coasting, Kicking
from nfi_monitor.types import Alert, AlertKind, Mechanism, Phase

__all__ = [
    "ANYTIME_RULES", "LEVELS", "NEARING_RULES", "PROVEN", "RULES", "WARNING_RULES", "Level", "Rule",
    "first_evidence", "of_other_mechanisms", "rule_of", "rule_of_alert",
]  # fmt: skip

# The order decides four things.  A rule may depend on those before it.  Of a quantity that several rules
# give as evidence, the first rule's counts.  Explanations list the levels in this order.  A mechanism is
# named by the last rule that is on, because that one is the nearest to the event.
RULES: tuple[Rule, ...] = (
    NonFinite(), Absorbing(), Inflating(), Imminent(), Coasting(), Overshooting(), Kicking(),
    Swinging(), Overreaching(), Surging(), Diverging(),
)  # fmt: skip

ANYTIME_RULES = tuple(rule for rule in RULES if rule.anytime)
"""Rules that are updated at every reading."""
NEARING_RULES = tuple(rule for rule in RULES if type(rule).nears is not Rule.nears)
"""Rules that may ask for every step to be read before they switch on."""
WARNING_RULES = tuple(rule for rule in RULES if not rule.anytime)
"""Rules that are updated at full readings, but not during a slingshot."""

LEVELS: tuple[Level, ...] = tuple(dict.fromkeys(level for rule in RULES for level in rule.levels))
"""All levels of all rules, in the order in which an explanation lists them."""

PROVEN = frozenset(rule.mechanism for rule in RULES if rule.proves)
"""Mechanisms that a rule measures directly. The other mechanisms are inferred."""

_BY_NAME = {rule.name: rule for rule in RULES}


def rule_of(mechanism: Mechanism, kind: AlertKind, phase: Phase | None = None) -> Rule | None:
    """Return the rule whose label describes an alert, or None if no rule has one.

    Only rules of the mechanism that have a label for the kind are candidates.  Among several candidates the
    first rule with the phase is returned, or else the first rule.
    """
    candidates = [rule for rule in RULES if rule.mechanism is mechanism and kind in rule.labels]
    return next((rule for rule in candidates if rule.phase is phase), candidates[0] if candidates else None)


def rule_of_alert(alert: Alert) -> Rule | None:
    """Return the rule that describes an alert: the rule saved with it, or else that of :func:`rule_of`."""
    saved = _BY_NAME.get(alert.rule)
    if saved is not None and alert.kind in saved.labels:
        return saved
    return rule_of(alert.mechanism, alert.kind, alert.phase)


def first_evidence(mechanism: Mechanism, kind: AlertKind, rule: str = "") -> tuple[str, ...]:
    """Return the quantities that an alert shows first; empty if no rule of its mechanism names any.

    ``rule``: name of the rule that describes the alert; its quantities are preferred.  If no rule of the
    mechanism names quantities for this kind, the first ones for another kind are returned.
    """
    own = _BY_NAME[rule].first_evidence if rule in _BY_NAME else {}
    if kind in own:
        return own[kind]
    given = [rule.first_evidence for rule in RULES if rule.mechanism is mechanism and rule.first_evidence]
    for by_kind in given:
        if kind in by_kind:
            return by_kind[kind]
    return next(iter(given[0].values())) if given else ()


@cache
def of_other_mechanisms(mechanism: Mechanism) -> frozenset[str]:
    """Return the quantities that are evidence of other mechanisms' rules only; empty without own rules."""
    own: set[str] = set()
    others: set[str] = set()
    for rule in RULES:
        first = {name for names in rule.first_evidence.values() for name in names}
        (own if rule.mechanism is mechanism else others).update(first)
        for level in rule.levels:
            mine = rule.mechanism is mechanism or mechanism in level.supports
            (own if mine else others).add(level.quantity)
    return frozenset(others - own) if own else frozenset()
