"""Keep the alerts of a run: each event has one alert, which begins, is updated, and ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from nfi_monitor.detect.alert_writer import AlertWriter
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.rules import PROVEN
from nfi_monitor.schema import decode
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Evidence, Mechanism, Outcome, Severity

Part = TypeVar("Part")
KEPT = 1_000
"""Number of alerts in a saved state, besides the firing ones. Earlier ones are in alerts.jsonl."""


@dataclass(frozen=True)
class Claim:
    """A request by the detector: an alert of this kind must fire now."""

    kind: AlertKind
    severity: Severity
    mechanism: Mechanism
    confidence: float
    develops: bool = True
    """True: update phase, mechanism and forecast at each reading.  False: only keep the alert going."""
    may_lower: bool = False
    """Whether the alert may become less severe, because nothing moves."""
    unmoved_since: int | None = None
    """Step since which nothing has moved; None: the step of the reading that lowers the severity."""


class AlertBook:
    """Keep ``alerts``, oldest first. At most one alert of each kind fires.

    Each method adds the changes of its alert to the judgement that it gets.
    """

    def __init__(self, writer: AlertWriter) -> None:
        self.alerts: list[Alert] = []
        self._writer = writer
        self._firing: dict[AlertKind, int] = {}  # kind → index into alerts
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Return whether an alert fires."""
        return bool(self._firing)

    def firing(self, kind: AlertKind) -> Alert | None:
        """Return the firing alert of this kind, or None."""
        index = self._firing.get(kind)
        return None if index is None else self.alerts[index]

    def hold(self, claim: Claim, step: int, judgement: Judgement) -> None:
        """Begin an alert, or keep the firing alert of the same kind going.

        The evidence stays as it was when the alert began.  If the alert becomes more severe, or changes its
        mechanism, what has crossed its threshold by then is added.
        """
        if claim.kind not in self._firing:
            self.begin(claim, step, judgement)
            return
        old = self.alerts[self._firing[claim.kind]]
        other = claim.severity is not old.severity
        rises = other and claim.severity.rank > old.severity.rank
        falls = other and not rises and claim.may_lower
        values: Mapping[str, float] = self._made(judgement, "evidence", {}, self._writer.values, claim.kind)
        new = replace(
            old,
            last_step=step,
            severity=claim.severity if rises or falls else old.severity,
            evidence=_with_extremes(old.evidence, values),
            **(self._developed(old, claim, judgement) if claim.develops else {}),
        )
        changed = new.mechanism is not old.mechanism
        if rises or falls or changed:
            new = self._changed(new, claim, judgement, risen=rises, fallen=falls, renamed=changed)
            judgement.changes.append((Change.UPDATE, new))
        self.alerts[self._firing[claim.kind]] = new

    def _changed(
        self, alert: Alert, claim: Claim, judgement: Judgement, *, risen: bool, fallen: bool, renamed: bool
    ) -> Alert:
        """Return the alert with the rule, evidence and advice of its new severity or mechanism."""
        step, since, evidence = alert.last_step, alert.unmoved_since, alert.evidence
        if risen:
            since = None
        elif fallen:
            since = step if claim.unmoved_since is None else claim.unmoved_since
        if risen or renamed:
            evidence = _with_crossings(evidence, self._evidence(judgement, alert.kind))
        old_advice = () if renamed else alert.advice
        return replace(
            alert,
            rule=self._rule(judgement, alert),
            evidence=evidence,
            advice=self._advice(judgement, old_advice, alert.kind, alert.mechanism, alert.severity),
            unmoved_since=since,
        )

    def _developed(self, alert: Alert, claim: Claim, judgement: Judgement) -> dict[str, Any]:
        """Return the phase, mechanism and forecast of this reading, as fields of the alert.

        Keep the mechanism with the highest confidence so far: near the spike all mechanisms look alike.  A
        proven mechanism (rounding, which is measured) replaces a mechanism that was only inferred.
        """
        more_certain = claim.confidence > alert.confidence or (
            claim.mechanism in PROVEN and alert.mechanism not in PROVEN
        )
        return {
            "phase": judgement.phase,
            "mechanism": claim.mechanism if more_certain else alert.mechanism,
            "confidence": claim.confidence if more_certain else alert.confidence,
            "steps_to_spike": self._forecast(judgement, claim),
        }

    def begin(self, claim: Claim, step: int, judgement: Judgement) -> None:
        """Begin an alert at ``step``."""
        kind = claim.kind
        self._counts[kind.value] = number = self._counts.get(kind.value, 0) + 1
        layer, rank = self._writer.origin
        alert = Alert(
            id=f"{kind}-{number}",
            kind=kind,
            severity=claim.severity,
            state=AlertState.FIRING,
            phase=judgement.phase,
            first_step=step,
            last_step=step,
            mechanism=claim.mechanism,
            confidence=claim.confidence,
            evidence=self._as_warned(self._evidence(judgement, kind), kind, step),
            steps_to_spike=self._forecast(judgement, claim),
            advice=self._advice(judgement, (), kind, claim.mechanism, claim.severity),
            layer=layer,
            rank=rank,
            tau=self._writer.tau,
        )
        alert = replace(alert, rule=self._rule(judgement, alert))
        self._firing[kind] = len(self.alerts)
        self.alerts.append(alert)
        judgement.changes.append((Change.BEGIN, alert))

    def _as_warned(self, fresh: dict[str, Evidence], kind: AlertKind, step: int) -> dict[str, Evidence]:
        """Return a slingshot's evidence with the thresholds that its *imminent* alert began with.

        A rule may apply another level by now, because its signals have risen further."""
        if kind is not AlertKind.SLINGSHOT:
            return fresh
        warnings = (
            alert
            for alert in reversed(self.alerts)
            if alert.kind is AlertKind.IMMINENT and alert.outcome is Outcome.SLINGSHOT
        )
        warning = next(warnings, None)
        if warning is None or warning.outcome_step != step:
            return fresh
        for name, began in warning.evidence.items():
            now = fresh.get(name)
            # A shrinking mean has a threshold below zero. By now the mean may grow: then keep the new one.
            same_side = now is not None and now.below is began.below
            if now is not None and name != "loss" and began.crossed and now.crossed and same_side:
                fresh[name] = replace(now, threshold=began.threshold)
        return fresh

    def end(
        self,
        kind: AlertKind,
        step: int,
        judgement: Judgement,
        *,
        outcome: tuple[Outcome | None, int | None] = (None, None),
    ) -> None:
        """End the alert of this kind at ``step``, if one fires.

        ``outcome``: what followed a warning, and the step at which that began; by default PASSED.  The loss
        of a slingshot is added to the evidence: to the warning as ``spike_loss``, as it was at the beginning
        of the slingshot, and to the slingshot's alert the peak and the level at which the loss stayed.
        """
        index = self._firing.pop(kind, None)
        if index is None:
            return
        alert = self.alerts[index]
        warns = kind in (AlertKind.AT_RISK, AlertKind.IMMINENT)
        followed, began = outcome
        if followed is None and warns:
            followed = Outcome.PASSED
        evidence = dict(alert.evidence)
        if kind is AlertKind.SLINGSHOT or followed is Outcome.SLINGSHOT:
            loss: Mapping[str, Evidence] = self._made(judgement, "evidence", {}, self._writer.loss)
            if warns:  # "loss" may be there already: the loss that stood out when the alert began
                evidence |= {"spike_loss": loss["loss"]} if "loss" in loss else {}
            else:
                now = {name: item.value for name, item in loss.items()}
                evidence = {**loss, **_with_extremes(evidence, now)}
        ended = replace(
            alert,
            state=AlertState.RESOLVED,
            last_step=step,
            evidence=evidence,
            steps_to_spike=None,
            outcome=followed,
            outcome_step=began,
        )
        self.alerts[index] = ended
        judgement.changes.append((Change.END, ended))

    def run_ended(self, step: int) -> list[Alert]:
        """Mark the firing alerts as still firing when the run ended at ``step``; return them."""
        for index in self._firing.values():
            alert = self.alerts[index]
            last = max(alert.last_step, step)
            self.alerts[index] = replace(alert, outcome=Outcome.OPEN, outcome_step=step, last_step=last)
        return [self.alerts[index] for index in sorted(self._firing.values())]

    # --- parts of an alert: if a part fails, the alert is raised without it ---------------------------

    @staticmethod
    def _made(
        judgement: Judgement, part: str, fallback: Part, make: Callable[..., Part], *arguments: object
    ) -> Part:
        """Return ``make(*arguments)``; if it raises, record the error and return ``fallback``."""
        try:
            return make(*arguments)
        except Exception as error:
            judgement.failed.append((part, error))
            return fallback

    def _evidence(self, judgement: Judgement, kind: AlertKind) -> dict[str, Evidence]:
        return self._made(judgement, "evidence", {}, self._writer.evidence, kind)

    def _rule(self, judgement: Judgement, alert: Alert) -> str:
        return self._made(judgement, "rule", alert.rule, self._writer.rule, alert.kind, alert.mechanism)

    def _forecast(self, judgement: Judgement, claim: Claim) -> tuple[int, int, int] | None:
        return self._made(judgement, "forecast", None, self._writer.forecast, claim.kind, claim.mechanism)

    def _advice(
        self,
        judgement: Judgement,
        fallback: tuple[str, ...],
        kind: AlertKind,
        mechanism: Mechanism,
        severity: Severity,
    ) -> tuple[str, ...]:
        return self._made(judgement, "advice", fallback, self._writer.advice, kind, mechanism, severity)

    # --- resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types, which JSON and torch.save both keep.

        Of the alerts, the firing ones and the last KEPT are in it: a checkpoint must not grow with the run.
        """
        start = max(len(self.alerts) - KEPT, 0)
        kept = sorted({*range(start, len(self.alerts)), *self._firing.values()})
        places = {index: place for place, index in enumerate(kept)}
        return {
            # Alert.to_json writes null for NaN and Inf. A resume needs the original values: use asdict.
            "alerts": [
                alert.to_json() | {"evidence": {name: asdict(item) for name, item in alert.evidence.items()}}
                for alert in (self.alerts[index] for index in kept)
            ],
            "firing": {kind.value: places[index] for kind, index in self._firing.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``alerts`` stays the same list object.

        Raises ValueError, and changes nothing, for another state.
        """
        alerts = [Alert.from_json(record) for record in decode(list[Any], state["alerts"])]
        firing = {AlertKind(kind): index for kind, index in decode(dict[str, int], state["firing"]).items()}
        counts = decode(dict[str, int], state["counts"])
        for kind, index in firing.items():
            if not (0 <= index < len(alerts) and alerts[index].kind is kind):
                raise ValueError(f"firing.{kind}: there is no such alert at place {index}")
            # The state may be from after the end of a run, which now goes on.
            alerts[index] = replace(alerts[index], outcome=None, outcome_step=None)
        self.alerts[:], self._firing, self._counts = alerts, firing, counts


def _with_extremes(old: Mapping[str, Evidence], values: Mapping[str, float]) -> dict[str, Evidence]:
    """Return the old items, those that crossed their thresholds with their extremes up to now."""
    items = dict(old)
    for name, item in old.items():
        value = values.get(name, math.nan) if item.crossed else math.nan
        extreme = item.value if item.extreme is None else item.extreme
        if value < extreme if item.below else value > extreme:
            items[name] = replace(item, extreme=value)
    return items


def _with_crossings(old: Mapping[str, Evidence], fresh: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Return the old items, and the fresh ones that have crossed their thresholds since; these come first."""
    new = {
        name: item
        for name, item in fresh.items()
        if name not in old or (item.crossed and not old[name].crossed)
    }
    return dict(sorted((new | dict(old) | new).items(), key=lambda entry: entry[1].crossed is False))
