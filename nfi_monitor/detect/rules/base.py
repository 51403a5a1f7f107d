"""Define what every rule owns: a switch, levels, evidence, a mechanism, advice, labels and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Reading, Severity, Thresholds

Limit = Callable[[Thresholds, RunContext], float]


@dataclass(frozen=True)
class Level:
    """The level of a signal at which a rule counts it as a sign of trouble. Explanations search for it."""

    signal: str
    """Name of the signal in an explanation's series."""
    quantity: str
    """Name of the quantity that shows the signal in an alert's evidence, in the unit of ``value``."""
    enter: Limit
    """Returns the level at which the sign begins, in the unit of ``value``."""
    leave: Callable[[Thresholds, float], float]
    """Returns the level at which the sign ends; the second argument is the level at which it began."""
    supports: tuple[Mechanism, ...]
    """Mechanisms that this sign supports."""
    made_of: tuple[str, ...]
    """Measured quantities of the signal. A reading with none of them has no value of the signal."""
    value: Callable[[Signals, Reading, RunContext], float]
    """Returns the signal after ``Signals`` was updated with the reading."""
    evidence_per_step: bool = False
    """Whether the evidence is per optimizer step while ``value`` is per τ."""
    below: bool = False
    """Whether low values are the sign; False: high values."""
    may_be_lower: bool = False
    """Whether the rule applies a lower level in some states. Then the alert's evidence has the level that was
    applied."""
    others_up_to: Limit | None = None
    """Evidence with a threshold up to this level belongs to another rule, which shares the quantity."""
    label: str = ""
    """Name of the signal in texts; empty: the quantity's own label."""
    show: str = "number"
    """Format of the values: "number", "nat", "percent of τ" or "percent of its maximum"."""
    bands: tuple[str, ...] = ()
    """Quantities beside which pictures draw this level as a band, from the level at which the sign ends to
    the level at which it begins."""

    def band(self, limits: Thresholds, context: RunContext) -> tuple[float, float]:
        """Return the levels at which the sign ends and begins, in the unit of the quantities in ``bands``."""
        enter = self.enter(limits, context)
        scale = 1.0 / context.tau if self.evidence_per_step else 1.0
        return scale * self.leave(limits, enter), scale * enter


class Rule:
    """Base class of the rules. A rule has no state: the detector keeps its switch.

    The detector updates the switch at each full reading, but not during a slingshot (see ``anytime``).  While
    the rule is on, the alerts in ``holds`` fire with at least the severity given there."""

    name: ClassVar[str]
    """Name of the rule's switch, in checkpoints and for other rules."""
    mechanism: ClassVar[Mechanism]
    """Mechanism that the rule recognizes."""
    holds: ClassVar[Mapping[AlertKind, Severity]]
    """Kind of each alert that fires while the rule is on → least severity."""
    phase: ClassVar[Phase] = Phase.HEALTHY
    """The run's phase while the rule is on, unless a rule with a later phase is on."""
    labels: ClassVar[Mapping[AlertKind, str]]
    """Kind of alert → what happens, in words. :func:`~nfi_monitor.detect.rules.rule_of` picks the rule."""
    advice: ClassVar[str]
    """Key of :data:`nfi_monitor.detect.advice.ADVICE`."""
    charts: ClassVar[tuple[str, ...]]
    """Titles of the charts that show the rule's quantities."""
    levels: ClassVar[tuple[Level, ...]] = ()
    """Levels of the rule's signals."""
    first_evidence: ClassVar[Mapping[AlertKind, tuple[str, ...]]] = {}
    """Kind of alert → quantities that the alert shows first."""
    proves: ClassVar[bool] = False
    """Whether the rule measures its mechanism directly. Other rules infer theirs, so this rule's mechanism
    takes precedence."""
    anytime: ClassVar[bool] = False
    """Whether the switch is also updated during a slingshot, and at a loss between readings."""
    confidence: ClassVar[float] = 0.7
    """Confidence in the mechanism by default."""

    @property
    def looks_at(self) -> tuple[str, ...]:
        """Measured quantities that the rule decides by."""
        return tuple(dict.fromkeys(name for level in self.levels for name in level.made_of))

    def enter(self, now: Situation) -> bool:
        """Return whether to switch the rule on."""
        raise NotImplementedError

    def stay(self, now: Situation) -> bool:
        """Return whether to keep the rule on."""
        raise NotImplementedError

    def nears(self, now: Situation) -> bool:
        """Return whether the signals are about half way to switching the rule on.

        Then every step is read; otherwise the rule would switch on late.
        """
        return False

    def severity(self, kind: AlertKind, now: Situation) -> Severity:
        """Return the least severity of an alert of ``kind`` while the rule is on.

        An *imminent* alert is one grade less severe if most of the rule's earlier ones led to nothing.
        """
        severity = self.holds[kind]
        if kind is AlertKind.IMMINENT and now.record.is_doubtful(self.name):
            return {Severity.CRITICAL: Severity.WARNING}.get(severity, Severity.INFO)
        return severity

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        """Return the rule's signals for the evidence of every alert, whether the rule is on or off."""
        return {}

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        """Return evidence that replaces :meth:`evidence` in alerts of ``kind`` while the rule is on.

        Give each condition of :meth:`enter` that is met and that :meth:`evidence` does not have, with the
        level that the rule applied.  The writer adds the step, and whether the value has crossed the level:
        downwards if the quantity's level is ``below``, or if the item says ``below=True``.  Set ``crossed``
        only where that comparison is wrong (NaN, two conditions on one quantity).
        """
        return {}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        """Return (mechanism, confidence) of an event before which the rule was on, or None if unknown."""
        return self.mechanism, self.confidence

    def forecast(self, now: Situation) -> tuple[int, int, int] | None:
        """Return (low, median, high) steps left while the rule is on, or None where it would be a guess."""
        return None


def finite(items: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Return the items with a finite value: the others were not measured."""
    return {name: item for name, item in items.items() if math.isfinite(item.value)}


def compared(item: Evidence, *, below: bool) -> Evidence:
    """Return the item with ``crossed`` and ``below``; an item that has ``crossed`` already stays as it is."""
    if item.crossed is not None:
        return item
    if item.threshold is None:
        return replace(item, below=below)
    beyond = item.value <= item.threshold if below else item.value >= item.threshold
    return replace(item, below=below, crossed=beyond)
