"""One run → what its slingshots came from, what its alarms were worth, whether its warnings were true.

**Mechanism.** The truth is the verdict of :func:`nfi_monitor.replay.replay`, from the last snapshot at least
4 τ before the slingshot; where that verdict is *unknown*, from 10 τ and then 2 τ before.  Of a kicked run the
truth is how it was made, if the loss rises and the same steps without the kick, from the snapshot before it,
have no rise.

**Averted.** An alarm is an alert *imminent*, or *at risk*; where rounding is named, *at risk* of severity
*warning*.  From the snapshot at the end of the step in which the first alarm was heard, the run goes on with
the action that the first line of the alarm's advice names.  Averted: no slingshot until 10 τ after the one of
the run as it was.

**At risk confirmed.** The criterion was written down before any run of this package was made:
see :data:`CONFIRMED`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

from nfi_monitor import Alert, AlertKind, Mechanism, Monitor
from nfi_monitor.detect.causes import LEARNED
from nfi_monitor.replay.run import AS_IT_WAS, FLOAT64_LOSS, NUDGED, Arm, smaller_lr
from nfi_monitor.replay.verdict import FLOAT64_NEEDS, margin
from tests.benchmarks.detection import generate
from tests.benchmarks.detection.experiments.plan import Stretch
from tests.benchmarks.detection.experiments.trials import GROWS_LESS, NoMonitor, Rerun
from tests.benchmarks.detection.proofs import kept as keys
from tests.benchmarks.detection.proofs.actions import Action, first_actions, in_words
from tests.benchmarks.detection.proofs.hear import Heard, hear, is_alarm
from tests.benchmarks.detection.proofs.kept import Kept
from tests.benchmarks.detection.proofs.subjects import (
    ABSORBS,
    AFTER,
    EVERY_STEP,
    Subject,
    net_of,
    unkicked,
)
from tests.benchmarks.detection.truth import Event, slingshots

Record = dict[str, Any]

CONFIRMED = (
    "A warning *at risk, numerical feature inflation* is confirmed where, from the warning on, the feature "
    "mean ‖μ_G‖ (same rows at both ends) or the weight norm grows less in the float64 twin than in the run: "
    "by more than 1e-4 nat per τ, and by more than the twin differs whose weights were moved by a part in a "
    "million. Both are compared after 10 τ, or one step before the next slingshot if one comes within 40 τ. "
    "It is confirmed as well where a slingshot comes within 40 τ and the float64 twin has none until 10 τ "
    "after it."
)
"""What confirms a warning; GROWS_LESS is the 1e-4 nat (1% of the growth that the product calls inflating)."""

AVERTED_FOR, HORIZON = 10.0, 10.0  # τ
BEFORE = (4.0, 10.0, 2.0)
"""τ before a slingshot (or ten times as many steps if that is more) from which it is replayed, in turn."""
TWIN_FOR, TWIN_AT_MOST = 10.0, 40.0  # τ
MOST = 4
"""Slingshots of one run that are gone back to, and warnings of one run that get a twin."""
LONGEST_REPLAYED = 200.0
"""τ above which a kicked run is not replayed under all arms: one replay would take 20,000 steps."""
RISES, RISES_TO = 3.0, 0.05
"""A kicked loss has risen if two readings in a row are so many times the largest of the 50 steps before the
kick, and above so many nats. This truth does not use the product's own spike detector."""


def key_of(subject: Subject) -> str:
    """Hash of all that the subject's record depends on."""
    own = keys.own_key("trial", "hear", "actions")
    remedies = generate._package("remedies")
    training = keys.training_key(subject.family)
    return generate._hash(training, keys.monitor_key(), keys.replay_key(), own, remedies)


def prove(subject: Subject, kept: Kept) -> Record:
    """The subject's record, from the cache or made now."""
    return cast(Record, kept.of(subject.name, key_of(subject), lambda: _prove(subject, kept)))


def _prove(subject: Subject, kept: Kept) -> Record:
    kick = subject.kick
    heard = hear(
        subject.family,
        subject.seed,
        every=1 if subject.kind == EVERY_STEP else "auto",
        regularly=subject.kind not in (ABSORBS, EVERY_STEP),
        also=() if kick is None else (kick.first - 1,),
    )
    on = _Continued(subject, heard, kept)
    family = subject.family
    steps = range(1, heard.steps + 1)
    events = slingshots(steps, heard.losses, heard.tau, nats=family.nats, floor=family.floor)
    record: Record = {
        "kind": subject.kind,
        "family": subject.family.name,
        "seed": subject.seed,
        "tau": heard.tau,
        "steps": heard.steps,
        "read": heard.read,
        "warned": [[event.start, _lead(heard, events, n, _imminent)] for n, event in enumerate(events)],
    }
    if subject.kind == EVERY_STEP:
        return record
    if kick is not None:
        return record | {"external": _external(subject, heard, events, on)}
    record["events"] = [_event(heard, events, n, on) for n in range(min(len(events), MOST))]
    record["twins"] = [on.twin(step, events) for step, _ in _warnings(heard)[:MOST]]
    return record


# --- what was heard ---------------------------------------------------------------------------------


def _alarms(heard: Heard) -> list[tuple[int, Alert]]:
    """The first time that each alert was an alarm, in order."""
    first: dict[str, tuple[int, Alert]] = {}
    for step, alert in heard.told:
        if is_alarm(alert):
            first.setdefault(alert.id, (step, alert))
    return list(first.values())


def _imminent(alert: Alert) -> bool:
    return alert.kind is AlertKind.IMMINENT


def _any(alert: Alert) -> bool:
    return True


def _warnings(heard: Heard) -> list[tuple[int, Alert]]:
    """*At risk* by rounding, of severity *warning*."""
    first: dict[str, tuple[int, Alert]] = {}
    for step, alert in heard.told:
        numeric = alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
        if is_alarm(alert) and numeric and alert.kind is AlertKind.AT_RISK:
            first.setdefault(alert.id, (step, alert))
    return list(first.values())


def _alarm(heard: Heard, events: Sequence[Event], n: int, wanted: Any) -> tuple[int, Alert] | None:
    """The first alarm before slingshot ``n`` that is its: heard since the last one, not ended long before."""
    start, since = events[n].start, events[n - 1].end if n else 0
    ends = {alert.id: alert.last_step for alert in heard.alerts}
    for step, alert in _alarms(heard):
        in_time = since < step < start and ends.get(alert.id, start) >= start - HORIZON * heard.tau
        if in_time and wanted(alert):
            return step, alert
    return None


def _lead(heard: Heard, events: Sequence[Event], n: int, wanted: Any) -> float | None:
    found = _alarm(heard, events, n, wanted)
    return None if found is None else (events[n].start - found[0]) / heard.tau


def _called(alerts: Iterable[Alert], first: int, last: int) -> Alert | None:
    """The slingshot that the monitor called in these steps."""
    found = (alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT)
    return next((alert for alert in found if first <= alert.first_step <= last), None)


# --- slingshots that come by themselves ----------------------------------------------------------------


def _event(heard: Heard, events: Sequence[Event], n: int, on: _Continued) -> Record:
    event = events[n]
    called = _called(heard.alerts, event.start - 5, max(event.end, event.start + 5))
    first, imminent = (_alarm(heard, events, n, wanted) for wanted in (_any, _imminent))
    return {
        "start": event.start,
        "named": "none" if called is None else str(called.mechanism),
        "confidence": None if called is None else called.confidence,
        "replay": on.verdict(event, events[n - 1].end if n else 0),
        "first": None if first is None else on.averted(*first, event.start),
        "imminent": None if imminent is None else on.averted(*imminent, event.start),
    }


class _Continued:
    """A run's other ways on, each made once and kept."""

    def __init__(self, subject: Subject, heard: Heard, kept: Kept) -> None:
        self.subject, self.heard, self.kept = subject, heard, kept
        self._training = keys.training_key(subject.family)

    def rerun(self) -> Rerun:
        """The training built anew, ready to go on from any snapshot."""
        subject, heard = self.subject, self.heard
        rerun = Rerun(subject.family, subject.seed, heard.recorded, heard.tau)
        rerun.snapshots = heard.snapshots
        return rerun

    def _of(self, what: str, make: Any, *about: Any) -> Any:
        key = generate._hash(self._training, str(self.subject.seed), keys.replay_key(), what, repr(about))
        name = f"continued/{self.subject.family.name}-{self.subject.seed}-{what}"
        return self.kept.of(name, key, make)

    def verdict(self, event: Event, since: int) -> Record | None:
        """Of a replay from each of BEFORE in turn, until one is decided; None: nowhere to begin."""
        found, tried = None, set()
        for ahead in BEFORE:
            latest = event.start - max(ahead * self.heard.tau, 10 * ahead)
            steps = self._beginnings(since, event.start)
            begin = max((step for step in steps if step <= latest), default=min(steps, default=None))
            if begin is None or begin in tried:
                continue
            tried.add(begin)
            stretch = Stretch(begin, event.start + margin(self.heard.tau) - begin)
            decay = f"{self.heard.snapshots[begin].second_moment_decay:.4g}"
            found = self._of("replay", partial(self._replay, stretch), stretch, decay)
            if found["mechanism"] != Mechanism.UNKNOWN:
                break
        return found

    def _beginnings(self, since: int, start: int) -> list[int]:
        """The snapshots between two slingshots; those of the first τ only where there is no other.

        There the second moment has not learned the gradients that it forgets later.
        """
        tau = self.heard.tau
        steps = [step for step in self.heard.snapshots if since < step < start - 1]
        settled = [step for step in steps if LEARNED * tau <= step <= start - FLOAT64_NEEDS * tau]
        return settled or steps

    def _replay(self, stretch: Stretch) -> Record:
        verdict = self.rerun().replay(stretch)
        return {
            "mechanism": str(verdict.mechanism),
            "from": stretch.step,
            "reproduced": verdict.reproduced,
            "arms": {name: outcome.spiked_at for name, outcome in verdict.outcomes.items()},
            "reasons": list(verdict.reasons),
        }

    def averted(self, step: int, alert: Alert, start: int) -> Record:
        """What the first advice of an alarm comes to."""
        actions = first_actions(alert.advice)
        stretch = Stretch(step, start + round(AVERTED_FOR * self.heard.tau) - step)
        spiked_at = start
        if actions:
            make = partial(self._with, actions, stretch)
            found = self._of("action", make, stretch, in_words(actions), generate._package("remedies"))
            spiked_at = found["spiked_at"]
        # What comes even if nothing is updated any more is out of reach of every advice.
        reach = True
        if spiked_at is not None:
            reach = self._of("stopped", partial(self._stopped, stretch), stretch)["spiked_at"] is None
        return {
            "step": step,
            "lead": (start - step) / self.heard.tau,
            "kind": str(alert.kind),
            "mechanism": str(alert.mechanism),
            "advice": alert.advice[0] if alert.advice else "",
            "action": in_words(actions) or None,
            "spiked_at": spiked_at,
            "averted": bool(actions) and spiked_at is None,
            "in_reach": reach,
        }

    def _with(self, actions: tuple[Action, ...], stretch: Stretch) -> Record:
        rerun = self.rerun()

        @contextmanager
        def change(_: Any) -> Iterator[None]:  # after the snapshot has been restored, which holds eps
            for action in actions:
                action.apply(rerun.training)
            yield

        return {"spiked_at": rerun.follow(stretch, Arm("advice", in_words(actions), change))}

    def _stopped(self, stretch: Stretch) -> Record:
        return {"spiked_at": self.rerun().follow(stretch, smaller_lr(0.0))}

    def twin(self, step: int, events: Sequence[Event]) -> Record:
        """A warning held against its float64 twin: see CONFIRMED."""
        tau = self.heard.tau
        next_one = next((event.start for event in events if event.start > step), None)
        followed = next_one is not None and next_one - step <= TWIN_AT_MOST * tau
        steps = round(TWIN_FOR * tau)
        if next_one is not None:
            steps = max(min(steps if not followed else next_one, next_one - 1 - step), 1)
        start = next_one if followed else None
        stretch = Stretch(step, steps)
        return cast(Record, self._of("twin", partial(self._twin, stretch, start), stretch, start, CONFIRMED))

    def _twin(self, stretch: Stretch, start: int | None) -> Record:
        rerun, tau = self.rerun(), self.heard.tau
        batch = stretch.step + 1  # the same rows at both ends
        rerun.snapshots[stretch.step].restore(rerun.training.model, rerun.training.optimizer, rerun.extras)
        norms = {"start": rerun.norms(batch)}
        for name, arm in (("run", AS_IT_WAS), ("float64", FLOAT64_LOSS), ("nudged", NUDGED)):
            spiked = rerun.follow(stretch, arm) is not None
            norms[name] = (math.nan, math.nan) if spiked else rerun.norms(batch)
        floor = GROWS_LESS * stretch.steps / tau
        less = [
            _grows_less({name: values[which] for name, values in norms.items()}, floor) for which in (0, 1)
        ]
        averts = None
        if start is not None:
            until = Stretch(stretch.step, start + round(AVERTED_FOR * tau) - stretch.step)
            averts = rerun.follow(until, FLOAT64_LOSS) is None
        return {
            "step": stretch.step,
            "steps": stretch.steps,
            "slingshot": start,
            "feature_mean": less[0],
            "weight_norm": less[1],
            "float64_averts": averts,
            "confirmed": less[0]["confirmed"] or less[1]["confirmed"] or bool(averts),
        }


def _grows_less(norm: dict[str, float], floor: float) -> Record:
    """Growth in nats of one norm in the run and its twins, and whether float64's is less."""
    known = norm["start"] > 0
    grown = {
        name: math.log(norm[name] / norm["start"]) if known and norm[name] > 0 else math.nan
        for name in ("run", "float64", "nudged")
    }
    chance = abs(grown["run"] - grown["nudged"])
    confirmed = grown["run"] - grown["float64"] > max(floor, 0.0 if math.isnan(chance) else chance)
    return {
        "confirmed": confirmed,
        **{name: value if math.isfinite(value) else None for name, value in grown.items()},
    }


# --- kicked runs ---------------------------------------------------------------------------------------


def _external(subject: Subject, heard: Heard, events: Sequence[Event], on: _Continued) -> Record:
    kick = subject.kick
    assert kick is not None
    until = kick.last + AFTER
    before = max(heard.losses[max(kick.first - 51, 0) : kick.first - 1])
    rises = _rises(heard.losses[kick.first - 1 : until], before)
    called = _called(heard.alerts, kick.first, until)
    record: Record = {
        "what": str(kick),
        "kick": kick.kind,
        "net": net_of(subject),
        "first": kick.first,
        "before": before,
        "peak": _finite(max(heard.losses[kick.first - 1 : until])),
        "rises": rises,
        "called": None if called is None else called.first_step,
        "named": "none" if called is None else str(called.mechanism),
        "confidence": None if called is None else called.confidence,
        "severity": None if called is None else str(called.severity),
        "evidence": {} if called is None else called.to_json()["evidence"],
        "advice": "" if called is None or not called.advice else called.advice[0],
        "clean": None,
        "replay": None,
    }
    if not rises:
        return record
    stretch = Stretch(kick.first - 1, until - kick.first + 1)
    record["clean"] = on._of("clean", partial(_without, subject, heard, stretch, before), stretch)["averts"]
    event = next((event for event in events if kick.first <= event.start <= until), None)
    if event is not None and heard.tau <= LONGEST_REPLAYED:
        since = max((other.end for other in events if other.end < kick.first), default=0)
        # From before the kick: what leads there is no slingshot, so it must not be gone back into.
        record["replay"] = on.verdict(Event(kick.first, event.end), since)
    return record


def _rises(losses: Sequence[float], before: float) -> bool:
    """Two readings in a row; NaN and Inf count."""
    high = [not loss <= max(RISES * before, RISES_TO) for loss in losses]
    return any(one and two for one, two in pairwise(high))


def _without(subject: Subject, heard: Heard, stretch: Stretch, before: float) -> Record:
    """Whether the loss does not rise in the same steps without the kick."""
    training, nobody = unkicked(subject).build(subject.seed, subject.family.arm), NoMonitor()
    extras = () if training.scheduler is None else (training.scheduler,)
    heard.snapshots[stretch.step].restore(training.model, training.optimizer, extras)
    losses = []
    for number in range(stretch.step + 1, stretch.end + 1):
        training.step(number, cast(Monitor, nobody))
        losses.append(nobody.loss())
    return {"averts": not _rises(losses, before)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
