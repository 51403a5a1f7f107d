"""Count a run's alerts one by one, and hold them against the truth.

An *imminent* alert is right if a slingshot begins within 10 τ (at least 50 steps) after it began, or if it
began in a slingshot.  A warning, which is an *at risk* alert of severity warning or above, is right if a
slingshot begins within 40 τ after it became a warning.  One that is not right, and after which the run ends
sooner than that, is *cut off* and not counted.  A *slingshot* alert is right if it calls a slingshot of the
truth (``score.calls``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from nfi_monitor.types import Alert, AlertKind, Change, Severity
from tests.benchmarks.detection import score
from tests.benchmarks.detection.score import Event, Truth

IMMINENT_WITHIN, FEWEST_STEPS = 10.0, 50.0  # τ, steps
WARNING_WITHIN = 40.0  # τ


@dataclass(frozen=True)
class Told:
    """What the alerts of any number of runs came to; counts add up."""

    steps: int = 0
    read: int = 0
    """Steps that were read in full."""
    imminent: int = 0
    imminent_right: int = 0
    imminent_cut: int = 0
    warnings: int = 0
    warnings_right: int = 0
    warnings_cut: int = 0
    slingshots: int = 0
    """Slingshots of the truth."""
    called: int = 0
    false_calls: int = 0
    near_calls: int = 0
    """Of the false calls, those at a near miss."""

    def __add__(self, other: Told) -> Told:
        return Told(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def told(
    alerts: Sequence[Alert], changes: Iterable[tuple[int, Change, Alert]], truth: Truth, read: int
) -> Told:
    """Count the alerts of one run, of which ``read`` steps were read in full."""
    within = max(IMMINENT_WITHIN * truth.tau, FEWEST_STEPS)
    soon = [alert.first_step for alert in alerts if alert.kind is AlertKind.IMMINENT]
    warned = _warned(changes)
    calls = [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT]
    false = [alert for alert in calls if not _calls_any(alert, truth.slingshots)]
    right, cut = _right(soon, within, truth)
    warnings_right, warnings_cut = _right(warned, WARNING_WITHIN * truth.tau, truth)
    return Told(
        steps=truth.steps,
        read=read,
        imminent=len(soon),
        imminent_right=right,
        imminent_cut=cut,
        warnings=len(warned),
        warnings_right=warnings_right,
        warnings_cut=warnings_cut,
        slingshots=len(truth.slingshots),
        called=sum(any(score.calls(alert, event) for alert in calls) for event in truth.slingshots),
        false_calls=len(false),
        near_calls=sum(_calls_any(alert, truth.near_misses) for alert in false),
    )


def _calls_any(alert: Alert, events: Iterable[Event]) -> bool:
    return any(score.calls(alert, event) for event in events)


def _warned(changes: Iterable[tuple[int, Change, Alert]]) -> list[int]:
    """Return the step at which each *at risk* alert first became a warning."""
    first: dict[str, int] = {}
    for step, _, alert in changes:
        if alert.kind is AlertKind.AT_RISK and alert.severity.rank >= Severity.WARNING.rank:
            first.setdefault(alert.id, step)
    return list(first.values())


def _right(starts: Sequence[int], within: float, truth: Truth) -> tuple[int, int]:
    """Return how many alerts are right, and how many are cut off by the end of the run."""
    right = cut = 0
    for step in starts:
        # An alert at a slingshot's second loss, of which the first was not read yet, is no miss.
        if any(
            step - 1 <= event.start <= step + within or event.start <= step <= event.end
            for event in truth.slingshots
        ):
            right += 1
        elif step + within > truth.steps:
            cut += 1
    return right, cut
