"""What a warning was worth: alarms held against the slingshots that came, by episodes.

**Truth.** Slingshots are found in the recorded loss by truth.py, which is not the detector that is judged.
Events that only levels ten times lower find are *near misses*: an alarm before one is neither a hit nor
false.  After a slingshot's first loss, at which no detector can name it yet, nothing is judged until it is
recovered.

**Alarms.** A rule sounds at some steps; pauses shorter than ``REFRACTORY`` τ make no new alarm.  An alarm
that was already sounding while the last slingshot was judged is carried over and does not count.

**A slingshot is warned of** when an alarm begins within ``HORIZON`` τ before its start (the lead is counted
from the first of those), or, failing that, when an older one still sounds (it is *early*, shown apart).
*In time* is a lead of at least ``TOO_LATE`` τ: later, the precision cure comes too late (measured).

**An alarm is false** when it began more than ``HORIZON`` τ before the next event and ended before it.  Where
the run ends first, a spiking family's alarm is *censored*: nobody knows.  In a quiet family every alarm is
false, also one that sounds at the end.  The rate's denominator is the steps at which an alarm would have been
judged false: neither in an event, nor in the horizon before one, nor censored.

What builds up over τ is judged in τ.  Slingshots that a few steps lead up to, whatever τ is (second moment,
edge of stability), are judged more strictly: the horizon is at most ``ABRUPT_HORIZON`` steps and a pause of
``ABRUPT_REFRACTORY`` makes a new alarm.  At β2 = .999 ten τ would excuse every alarm of 10,000 steps.

Everything here is numbers in, numbers out: monitor and peers pass through the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfi_monitor.types import Alert, AlertKind, Change, Severity
from tests.benchmarks.detection.truth import Event, Levels, recovery_steps, slingshots

HORIZON = 10.0  # τ
REFRACTORY = 1.0  # τ
ABRUPT_HORIZON, ABRUPT_REFRACTORY = 500.0, 50.0  # steps
TOO_LATE = 1.25  # τ
EARLY = 20  # steps that a slingshot's alert may begin before its label, whose levels are others
FORECAST_AT = (10, 6, 4, 3, 2, 1)  # τ before the slingshot


@dataclass(frozen=True)
class Truth:
    """What happened in a run of ``steps`` optimizer steps."""

    steps: int
    tau: float
    slingshots: tuple[Event, ...]  # ends include the recovery
    near_misses: tuple[Event, ...] = ()
    quiet: bool = False  # of a family that should not spike: nothing is censored
    abrupt: bool = False  # what it should warn of builds up within steps, not within τ

    @property
    def horizon(self) -> float:
        return min(HORIZON * self.tau, ABRUPT_HORIZON if self.abrupt else math.inf)

    @property
    def pause(self) -> float:
        """Steps of silence after which an alarm is a new one."""
        return max(min(REFRACTORY * self.tau, ABRUPT_REFRACTORY if self.abrupt else math.inf), 1.0)


@dataclass(frozen=True)
class Score:
    """Of one rule on any number of runs; scores add up."""

    slingshots: int = 0
    warned: int = 0
    early: int = 0
    in_time: int = 0
    near_misses: int = 0
    false_alarms: int = 0
    near_alarms: int = 0
    censored: int = 0
    exposure: int = 0  # steps at which an alarm would have been judged false
    sounding: int = 0  # of them, steps with an alarm
    leads: tuple[tuple[int, float], ...] = ()  # (steps, τ) of each slingshot warned of

    def __add__(self, other: Score) -> Score:
        return Score(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def lead(self, quantile: float, *, in_tau: bool) -> float:
        """Quantile of the leads of those warned of; NaN without any."""
        leads = [lead[1] if in_tau else lead[0] for lead in self.leads]
        return float(np.quantile(leads, quantile)) if leads else math.nan


# --- truth -----------------------------------------------------------------------------------------


def truth_of(
    steps: Sequence[int],
    loss: Sequence[float],
    tau: float,
    *,
    quiet: bool = False,
    abrupt: bool = False,
    nats: bool = True,
    floor: bool = True,
    last: int | None = None,
) -> Truth:
    """Slingshots and near misses of a recorded loss; ``last`` is the run's last step, if not the loss's."""
    found = slingshots(steps, loss, tau, nats=nats, floor=floor)
    lower = slingshots(steps, loss, tau, nats=nats, floor=floor, levels=Levels().near())
    recovery = round(recovery_steps(tau))
    near = tuple(
        event
        for event in lower
        if not any(event.start <= other.end and other.start - recovery <= event.end for other in found)
    )
    end = last if last is not None else steps[-1] if len(steps) else 0
    return Truth(end, tau, found, near, quiet, abrupt)


# --- alarms ----------------------------------------------------------------------------------------


def alarms_of(sounded: Iterable[int], truth: Truth) -> list[Event]:
    """Steps at which a rule sounded → alarms, without what happened in slingshots or is carried over."""
    pause = truth.pause
    excused = np.zeros(truth.steps + 2, dtype=bool)
    for event in truth.slingshots:
        excused[event.start + 1 : event.end + 1] = True
    alarms: list[Event] = []
    last, carried = -math.inf, False
    for step in sorted(set(sounded)):
        goes_on = step - last <= pause
        if excused[step]:
            carried = True
        elif not goes_on or (not carried and excused[int(last) : step].any()):
            alarms.append(Event(step, step))
            carried = False
        elif not carried:
            alarms[-1] = Event(alarms[-1].start, step)
        last = step
    return alarms


def firing_steps(alerts: Iterable[Alert], kind: AlertKind) -> list[int]:
    """Steps at which alerts of a kind fired."""
    of_kind = (alert for alert in alerts if alert.kind is kind)
    return [
        step
        for alert in of_kind
        for step in range(alert.first_step, max(alert.last_step, alert.first_step + 1))
    ]


def judge(sounded: Iterable[int], truth: Truth) -> Score:
    """One rule on one run."""
    alarms = alarms_of(sounded, truth)
    score = Score(slingshots=len(truth.slingshots), near_misses=len(truth.near_misses))
    for slingshot in truth.slingshots:
        score += _warning(alarms, slingshot, truth)
    events = [*truth.slingshots, *truth.near_misses]
    for alarm in alarms:
        score += _justice(alarm, truth, events)
    open_steps = _exposed(truth, events)
    sounding = np.zeros(truth.steps + 1, dtype=bool)
    for alarm in alarms:
        sounding[alarm.start : alarm.end + 1] = True
    return score + Score(exposure=int(open_steps.sum()), sounding=int((open_steps & sounding).sum()))


def _warning(alarms: Iterable[Event], slingshot: Event, truth: Truth) -> Score:
    """Whether and when one slingshot was warned of."""
    pause = truth.pause
    since = max((event.end for event in truth.slingshots if event.end < slingshot.start), default=0)
    before = [alarm for alarm in alarms if since < alarm.start <= slingshot.start]
    timely = [alarm.start for alarm in before if slingshot.start - alarm.start <= truth.horizon]
    sounding = [alarm.start for alarm in before if slingshot.start - alarm.end <= pause]
    if not timely and not sounding:
        return Score()
    lead = slingshot.start - min(timely or sounding)
    return Score(
        warned=1,
        early=int(not timely),
        in_time=int(lead >= TOO_LATE * truth.tau),
        leads=((lead, lead / truth.tau),),
    )


def _justice(alarm: Event, truth: Truth, events: Sequence[Event]) -> Score:
    """Whether one alarm was false, before a near miss, or cut off by the end of the run."""
    pause = truth.pause
    following = [event for event in events if event.start >= alarm.start]
    following += [event for event in truth.near_misses if event.start <= alarm.start <= event.end]
    reached = [
        event
        for event in following
        if event.start - alarm.start <= truth.horizon or event.start - alarm.end <= pause
    ]
    if any(event in truth.slingshots for event in reached):
        return Score()
    if reached:
        return Score(near_alarms=1)
    if not truth.quiet and (truth.steps - alarm.start < truth.horizon or truth.steps - alarm.end <= pause):
        return Score(censored=1)
    return Score(false_alarms=1)


def _exposed(truth: Truth, events: Iterable[Event]) -> NDArray[np.bool_]:
    """Steps (index 0 unused) at which a short alarm would be judged false."""
    exposed = np.ones(truth.steps + 1, dtype=bool)
    exposed[0] = False
    for event in events:
        exposed[max(math.ceil(event.start - truth.horizon), 0) : event.end + 1] = False
    if not truth.quiet:
        exposed[max(math.ceil(truth.steps - truth.horizon), 0) :] = False
    return exposed


# --- mechanism and forecast --------------------------------------------------------------------------


def mechanisms(alerts: Iterable[Alert], truth: Truth) -> dict[int, str]:
    """Start of each slingshot → the mechanism its alert named; "none" for one without alert."""
    said = [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT]
    found: dict[int, str] = {}
    for event in truth.slingshots:
        own = next((alert for alert in said if calls(alert, event)), None)
        found[event.start] = "none" if own is None else str(own.mechanism)
    return found


def calls(alert: Alert, event: Event) -> bool:
    """Return whether a slingshot alert is about this event.

    It began in the event, or a little before the label, or it still fired when the event began.
    """
    began = event.start - EARLY <= alert.first_step <= event.end
    return began or alert.first_step <= event.start <= alert.last_step


@dataclass(frozen=True)
class Forecasts:
    """At one distance before slingshots: how many were warned of by then, and what was said."""

    slingshots: int = 0
    warned: int = 0
    ratios: tuple[float, ...] = field(default=())  # said / true steps left, where a number was said

    def __add__(self, other: Forecasts) -> Forecasts:
        return Forecasts(
            self.slingshots + other.slingshots, self.warned + other.warned, self.ratios + other.ratios
        )

    def within(self, factor: float) -> int:
        return sum(1 / factor <= ratio <= factor for ratio in self.ratios)


def forecasts(said: NDArray[np.float64], warned: NDArray[np.bool_], truth: Truth) -> dict[int, Forecasts]:
    """Forecasts at FORECAST_AT τ before each slingshot that leaves so much room since the last event."""
    found = {distance: Forecasts() for distance in FORECAST_AT}
    for event in truth.slingshots:
        since = max((other.end for other in truth.slingshots if other.end < event.start), default=0)
        for distance in FORECAST_AT:
            left = round(distance * truth.tau)
            step = event.start - left
            if step <= since:
                continue
            number = float(said[step])
            ratios = (number / left,) if math.isfinite(number) else ()
            found[distance] += Forecasts(1, int(warned[step]), ratios)
    return found


def numbers_in_the_last_tau(said: NDArray[np.float64], truth: Truth) -> int:
    """Slingshots before which a number was still given with less than a τ left, where a state should be."""
    width = max(math.ceil(truth.tau) - 1, 0)
    return sum(
        bool(np.isfinite(said[max(event.start - width, 0) : event.start]).any()) for event in truth.slingshots
    )


def warning_steps(alerts: Iterable[Alert], changes: Iterable[tuple[int, Change, Alert]]) -> list[int]:
    """Return the steps at which *at risk* fired with severity warning or above; a severity may fall."""
    marks: dict[str, list[tuple[int, bool]]] = {}
    for step, change, alert in changes:
        if alert.kind is AlertKind.AT_RISK and change is not Change.END:
            severe = alert.severity.rank >= Severity.WARNING.rank
            marks.setdefault(alert.id, []).append((step, severe))
    steps: list[int] = []
    for alert in alerts:
        spans = marks.get(alert.id, [])
        ends = [*(step for step, _ in spans), alert.last_step][1:]
        for (begin, severe), end in zip(spans, ends, strict=True):
            if severe:
                steps.extend(range(begin, max(end, begin + 1)))
    return steps


# --- intervals ---------------------------------------------------------------------------------------


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share, 95% by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high
