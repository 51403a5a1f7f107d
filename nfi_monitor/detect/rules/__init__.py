"""The rules, in the order in which the detector asks them: a rule may depend on those before it.

Each rule owns its switch, levels, evidence, mechanism, advice, words and charts.  To add one, write it into a
file of this package and put it into :data:`RULES`.  The tests in ``tests/detect/rules`` name what is missing.
"""

from __future__ import annotations

from nfi_monitor.detect.rules.base import Level, Rule
from nfi_monitor.detect.rules.non_finite import NonFinite
from nfi_monitor.detect.rules.numeric import Absorbing, Imminent, Inflating
from nfi_monitor.detect.rules.oscillation import Swinging
from nfi_monitor.detect.rules.second_moment import Coasting, Kicking
from nfi_monitor.types import AlertKind, Mechanism, Phase

__all__ = ["LEVELS", "PROVEN", "RULES", "Level", "Rule", "first_evidence", "rule_of"]

RULES: tuple[Rule, ...] = (
    NonFinite(), Absorbing(), Inflating(), Imminent(), Coasting(), Kicking(), Swinging(),
)  # fmt: skip

LEVELS: tuple[Level, ...] = tuple(level for rule in RULES for level in rule.levels)
"""All levels, in the order in which an explanation lists them."""

PROVEN = frozenset(rule.mechanism for rule in RULES if rule.proves)
"""Mechanisms that a rule sees at work. The others are inferred."""


def rule_of(mechanism: Mechanism, kind: AlertKind, phase: Phase | None = None) -> Rule | None:
    """Return the rule whose words describe an alert; None where no rule speaks for the mechanism.

    Among the rules of the mechanism that have words for the kind, the one of the phase wins, else the first.
    """
    speaking = [rule for rule in RULES if rule.mechanism is mechanism and kind in rule.labels]
    return next((rule for rule in speaking if rule.phase is phase), speaking[0] if speaking else None)


def first_evidence(mechanism: Mechanism, kind: AlertKind) -> tuple[str, ...]:
    """Return the quantities that an alert shows first: by a rule of its mechanism, for its kind if one says
    so.
    """
    said = [rule.first_evidence for rule in RULES if rule.mechanism is mechanism and rule.first_evidence]
    for of_kind in said:
        if kind in of_kind:
            return of_kind[kind]
    return next(iter(said[0].values())) if said else ()
