"""Define the detector's answer to one reading."""

from __future__ import annotations

from dataclasses import dataclass, field

from nfi_monitor.types import Alert, Change, Phase


@dataclass
class Judgement:
    """The detector's answer to one reading."""

    phase: Phase
    """Phase of the run after the reading."""
    changes: list[tuple[Change, Alert]] = field(default_factory=list)
    """Alerts that began, changed or ended."""
    derived: dict[str, float] = field(default_factory=dict)
    """Quantities that the detector adds to the reading: growth rates, decay."""
    failed: list[tuple[str, Exception]] = field(default_factory=list)
    """Parts of an alert (evidence, forecast, advice) that raised an error, with the error."""
