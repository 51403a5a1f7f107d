"""Define alerts: their kinds, evidence and outcomes. No torch, no numpy.

Everything here is a frozen dataclass, or an enum whose value is the word written to disk.  So an alert is the
same object in the console, in ``alerts.jsonl``, in TensorBoard and in a callback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from nfi_monitor.schema import Between, Measured, decode


class Phase(str, Enum):
    """The part of the slingshot cycle that a run is in."""

    HEALTHY = "healthy"
    ABSORBING = "absorbing"  # rounding breaks the zero-sum; the feature mean does not grow yet
    INFLATING = "inflating"  # in addition, the feature mean grows
    IMMINENT = "imminent"  # updates move the logits by a large part of a nat within τ/20 steps
    SLINGSHOT = "slingshot"  # the loss has risen far above its usual level
    RECOVERING = "recovering"  # the loss is low again, the second moment has not settled yet

    def __str__(self) -> str:
        return self.value


class AlertKind(str, Enum):
    AT_RISK = "at_risk"  # a state; can last for thousands of steps
    IMMINENT = "imminent"  # a prediction
    SLINGSHOT = "slingshot"  # a fact
    NON_FINITE = "non_finite"  # NaN or Inf in the loss, the gradients or the weights

    def __str__(self) -> str:
        return self.value


class Severity(str, Enum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    def __str__(self) -> str:
        return self.value

    @property
    def rank(self) -> int:
        """Order of the severity, 0 to 2 (``alert.severity.rank >= Severity.WARNING.rank``)."""
        return list(Severity).index(self)


class AlertState(str, Enum):
    FIRING = "firing"
    RESOLVED = "resolved"

    def __str__(self) -> str:
        return self.value


class Outcome(str, Enum):
    """What followed an alert."""

    SLINGSHOT = "slingshot"  # a slingshot began: the warning came true
    BURST = "burst"  # the loss rose far above its noise, but not as high as in a slingshot
    PASSED = "passed"  # neither
    OPEN = "open"  # it still fired when the run ended

    def __str__(self) -> str:
        return self.value


class Mechanism(str, Enum):
    """The cause of a spike of the loss, past or expected."""

    NUMERICAL_FEATURE_INFLATION = "numerical_feature_inflation"  # Liu et al. 2026, Theorem 3.7
    SECOND_MOMENT = "second_moment"  # W. Wu 2024, section 2.1
    EDGE_OF_STABILITY = "edge_of_stability"  # Bai et al., arXiv 2506.04805
    EXTERNAL = "external"  # a jump of the learning rate, or a bad batch
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Evidence:
    """One quantity that an alert is based on, with the threshold it is compared with.

    ``value`` stays as it was when the alert began, or when the alert became more severe or changed its
    mechanism; ``step`` is the step of that reading.  Alerts of version 0.2 and before have the value of their
    last reading, and no ``crossed`` and ``step``.
    """

    value: Measured
    threshold: float | None = None
    baseline: float | None = None
    crossed: bool | None = None
    """Whether ``value`` had crossed ``threshold``; None: unknown, or there is no threshold."""
    below: bool = False
    """Whether low values are the sign; False: high values."""
    step: int | None = None
    extreme: float | None = None
    """Most extreme value while the alert fired, if it went beyond ``value``."""

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain types. NaN and Inf become None; fields that say nothing are left out."""
        record: dict[str, Any] = {
            key: finite_or_none(getattr(self, key)) for key in ("value", "threshold", "baseline")
        }
        rest: dict[str, Any] = {
            "crossed": self.crossed,
            "below": self.below or None,
            "step": self.step,
            "extreme": finite_or_none(self.extreme),
        }
        return record | {key: value for key, value in rest.items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Evidence:
        """Make evidence from the result of :meth:`to_json`.

        Raises ValueError, with the field's name, for a missing field and one of another type.
        """
        found: Evidence = decode(cls, record)
        return found


_RENAMED = {"zero_sum_violation": "zero_sum_violation_smoothed"}
"""Old name → new name of an alert's evidence. The value was that of the smoothed violation always."""


@dataclass(frozen=True)
class Alert:
    """One event with a beginning and an end.

    ``first_step`` and ``last_step`` are optimizer steps; ``last_step`` grows while the alert fires.
    ``steps_to_spike`` is ``(low, median, high)``, counted from ``last_step``, or None if the number would be
    a guess.  ``confidence``, in [0, 1], is the confidence in ``mechanism``.  ``rule`` is the name of the
    detector's rule that describes the alert; empty where no rule of the mechanism is on, and in alerts of
    version 0.2 and before.

    ``outcome`` is what followed an *at risk* or *imminent* alert, None while it fires; ``outcome_step`` is
    the step at which that slingshot or burst began.  An alert of any kind that still fires when the run ends
    has the outcome OPEN and the run's last step.  ``unmoved_since``: the severity was lowered, because
    nothing has moved since this step.  ``tau``: time constant τ in optimizer steps when the alert began, with
    which texts give a growth in percent per τ; None in alerts of version 0.3 and before.
    """

    id: str
    kind: AlertKind
    severity: Severity
    state: AlertState
    phase: Phase
    first_step: int
    last_step: int
    mechanism: Mechanism
    confidence: Annotated[float, Between(0, 1)]
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    steps_to_spike: tuple[int, int, int] | None = None
    advice: tuple[str, ...] = ()
    layer: str | None = None
    rank: int = 0
    rule: str = ""
    outcome: Outcome | None = None
    outcome_step: int | None = None
    unmoved_since: int | None = None
    tau: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain types. Evidence that is NaN or Inf becomes None, which any JSON has."""
        record = dict(vars(self))  # asdict() would copy all the evidence first: a run may have 100,000 alerts
        for key in ("kind", "severity", "state", "phase", "mechanism"):
            record[key] = str(record[key])
        record["outcome"] = None if self.outcome is None else str(self.outcome)
        record["evidence"] = {name: item.to_json() for name, item in self.evidence.items()}
        record["steps_to_spike"] = list(self.steps_to_spike) if self.steps_to_spike else None
        record["advice"] = list(self.advice)
        record["tau"] = finite_or_none(self.tau)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Alert:
        """Make an alert from the result of :meth:`to_json`; ignore unknown keys of a newer version.

        Raises ValueError, with the field's name, for a missing field and one of another type or an unknown
        enum value.
        """
        evidence = record.get("evidence") if isinstance(record, Mapping) else None
        if isinstance(evidence, Mapping):
            evidence = {_RENAMED.get(name, name): item for name, item in evidence.items()}
            record = {**record, "evidence": evidence}
        found: Alert = decode(cls, record)
        return found


class Change(str, Enum):
    """What happened to an alert. The console prints BEGIN, END and a change of severity."""

    BEGIN = "begin"
    UPDATE = "update"  # phase, severity, mechanism or forecast changed in a way worth a line
    END = "end"

    def __str__(self) -> str:
        return self.value


def finite_or_none(value: float | None) -> float | None:
    """Return ``value``, or None if it is NaN or Inf, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
