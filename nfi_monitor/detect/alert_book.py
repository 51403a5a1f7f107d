"""Keep the alerts of a run: each event has one alert, which begins, is updated, and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from nfi_monitor.detect.alert_writer import AlertWriter
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.rules import PROVEN
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Evidence, Mechanism, Outcome, Severity

Part = TypeVar("Part")


@dataclass(frozen=True)
class Claim:
    """A request by the detector: an alert of this kind must fire now."""

    kind: AlertKind
    severity: Severity
    mechanism: Mechanism
    confidence: float
    develops: bool = True
    """True: update evidence, phase and forecast at each reading.  False: update only the evidence, and only
    when the severity rises."""


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
        """Begin an alert, or keep the firing alert of the same kind going."""
        if claim.kind not in self._firing:
            self.begin(claim, step, judgement)
            return
        old = self.alerts[self._firing[claim.kind]]
        rises = claim.severity is not old.severity and claim.severity.rank > old.severity.rank
        severity = claim.severity if rises else old.severity
        if claim.develops:
            new = self._updated(old, claim, severity, step, judgement)
        else:
            new = replace(old, last_step=step, severity=severity)
            if rises:
                evidence: Mapping[str, Evidence] = self._made(
                    judgement, "evidence", {}, self._writer.evidence, claim.kind
                )
                new = replace(new, evidence=evidence)
        if rises or new.mechanism is not old.mechanism:
            old_advice = old.advice if new.mechanism is old.mechanism else ()
            advice = self._advice(judgement, old_advice, claim.kind, new.mechanism, severity)
            new = replace(new, advice=advice)
            judgement.changes.append((Change.UPDATE, new))
        self.alerts[self._firing[claim.kind]] = new

    def _updated(
        self, alert: Alert, claim: Claim, severity: Severity, step: int, judgement: Judgement
    ) -> Alert:
        """Return the alert with the phase, evidence, mechanism and forecast at ``step``.

        Keep the mechanism with the highest confidence so far: near the spike all mechanisms look alike.  A
        proven mechanism (rounding, which is measured) replaces a mechanism that was only inferred.
        """
        more_certain = claim.confidence > alert.confidence or (
            claim.mechanism in PROVEN and alert.mechanism not in PROVEN
        )
        return replace(
            alert,
            last_step=step,
            severity=severity,
            phase=judgement.phase,
            mechanism=claim.mechanism if more_certain else alert.mechanism,
            confidence=claim.confidence if more_certain else alert.confidence,
            evidence=self._made(judgement, "evidence", alert.evidence, self._writer.renewed, alert),
            steps_to_spike=self._forecast(judgement, claim),
        )

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
            evidence=self._made(judgement, "evidence", {}, self._writer.evidence, kind),
            steps_to_spike=self._forecast(judgement, claim),
            advice=self._advice(judgement, (), kind, claim.mechanism, claim.severity),
            layer=layer,
            rank=rank,
        )
        self._firing[kind] = len(self.alerts)
        self.alerts.append(alert)
        judgement.changes.append((Change.BEGIN, alert))

    def end(
        self,
        kind: AlertKind,
        step: int,
        judgement: Judgement,
        *renewed: str,
        outcome: tuple[Outcome | None, int | None] = (None, None),
    ) -> None:
        """End the alert of this kind at ``step``, if one fires.

        ``renewed``: quantities whose evidence is updated at the end.  ``outcome``: what followed a warning,
        and the step at which that began.
        """
        index = self._firing.pop(kind, None)
        if index is None:
            return
        evidence = dict(self.alerts[index].evidence)
        if renewed:
            now: Mapping[str, Evidence] = self._made(judgement, "evidence", {}, self._writer.evidence, kind)
            evidence |= {name: item for name, item in now.items() if name in renewed}
        ended = replace(
            self.alerts[index],
            state=AlertState.RESOLVED,
            last_step=step,
            evidence=evidence,
            steps_to_spike=None,
            outcome=outcome[0],
            outcome_step=outcome[1],
        )
        self.alerts[index] = ended
        judgement.changes.append((Change.END, ended))

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
        """Return the state in plain types, which JSON and torch.save both keep."""
        return {
            # Alert.to_json writes null for NaN and Inf. A resume needs the original values: use asdict.
            "alerts": [
                alert.to_json() | {"evidence": {name: asdict(item) for name, item in alert.evidence.items()}}
                for alert in self.alerts
            ],
            "firing": {kind.value: index for kind, index in self._firing.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``alerts`` stays the same list object."""
        self.alerts[:] = [Alert.from_json(record) for record in state["alerts"]]
        self._firing = {AlertKind(kind): int(index) for kind, index in state["firing"].items()}
        self._counts = dict(state["counts"])
