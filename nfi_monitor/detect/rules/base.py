"""What every rule owns: a switch, levels, evidence, a mechanism, advice, words and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.types import AlertKind, Evidence, Mechanism, Phase, Reading, Severity, Thresholds

Limit = Callable[[Thresholds, RunContext], float]


@dataclass(frozen=True)
class Level:
    """A signal, and the level at which a rule takes it for a sign: what an explanation looks for.

    ``enter`` is where the sign begins; ``leave(limits, level)`` where it ends, from the level that it began
    at."""

    signal: str
    """Its name in an explanation's series."""
    quantity: str
    """The quantity of the alert's evidence that it is shown as."""
    enter: Limit
    leave: Callable[[Thresholds, float], float]
    supports: tuple[Mechanism, ...]
    """Mechanisms that the alert is known by it."""
    made_of: tuple[str, ...]
    """Measured quantities: without any of these in a reading there is no signal of it."""
    value: Callable[[Signals, Reading, RunContext], float]
    """The signal at a reading that ``Signals`` has just taken in, in the unit of ``enter``."""
    below: bool = False
    """Whether low values are the sign."""
    lowered: bool = False
    """Whether the rule asks for less in some states: the alert's evidence has the level that it was raised
    by.
    """
    keeps_lowest: bool = False
    """Whether an alert keeps the lowest level of its whole life, though the rule may ask for more by now."""
    others_up_to: Limit | None = None
    """Where rules share the quantity: evidence with a threshold up to this level is another rule's."""
    label: str = ""
    """What it is called; empty: the quantity's own label."""
    show: str = "number"
    """How its values are written: "number", "nat", "percent of τ" or "percent of its maximum"."""


class Rule:
    """One rule. It has no state of its own: the detector keeps its switch.

    A rule is asked at each full reading, and between slingshots only (unless ``anytime``).  While it is on,
    it holds the alerts ``holds`` with at least the severity given there."""

    name: ClassVar[str]
    """Of its switch, in checkpoints and for other rules."""
    mechanism: ClassVar[Mechanism]
    """What it speaks for."""
    holds: ClassVar[Mapping[AlertKind, Severity]]
    phase: ClassVar[Phase] = Phase.HEALTHY
    """The run's phase while it is on, unless a rule with a later phase is."""
    labels: ClassVar[Mapping[AlertKind, str]]
    """What an alert of a kind says is going on, where this rule has the most to say of it."""
    advice: ClassVar[str]
    """Key of :data:`nfi_monitor.detect.advice.ADVICE`."""
    charts: ClassVar[tuple[str, ...]]
    """Titles of the charts that show what it looks at."""
    levels: ClassVar[tuple[Level, ...]] = ()
    first_evidence: ClassVar[Mapping[AlertKind, tuple[str, ...]]] = {}
    """Quantities that an alert of a kind shows first."""
    proves: ClassVar[bool] = False
    """Whether it sees its mechanism at work. The others infer theirs, and give way to it."""
    anytime: ClassVar[bool] = False
    """Whether it is also asked within a slingshot, and at a loss between readings."""
    confidence: ClassVar[float] = 0.7
    """In its mechanism, where nothing else is known."""

    @property
    def looks_at(self) -> tuple[str, ...]:
        """The measured quantities that it decides on."""
        return tuple(dict.fromkeys(name for level in self.levels for name in level.made_of))

    def enter(self, now: Situation) -> bool:
        """Whether to switch on."""
        raise NotImplementedError

    def stay(self, now: Situation) -> bool:
        """Whether to stay on."""
        raise NotImplementedError

    def nears(self, now: Situation) -> bool:
        """Whether its signals are half way to switching on: every step is read then, or it would be seen
        late.
        """
        return False

    def severity(self, kind: AlertKind, now: Situation) -> Severity:
        """How severe an alert of ``kind`` is at least while the rule is on."""
        return self.holds[kind]

    def evidence(self, now: Situation) -> dict[str, Evidence]:
        """What every alert shows of its signals, whether it is on or not."""
        return {}

    def claims(self, now: Situation, kind: AlertKind) -> dict[str, Evidence]:
        """What an alert of ``kind`` shows instead while the rule is on: the levels that it asked for then."""
        return {}

    def cause(self, causes: Causes) -> tuple[Mechanism, float] | None:
        """(mechanism, confidence) of an event before which it was on; None: it does not tell."""
        return self.mechanism, self.confidence

    def forecast(self, now: Situation) -> tuple[int, int, int] | None:
        """(low, median, high) steps left while it is on; None where a number would be a guess."""
        return None


def finite(items: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Leave out what was not seen."""
    return {name: item for name, item in items.items() if math.isfinite(item.value)}
