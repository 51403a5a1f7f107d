"""What the detector answers to one reading."""

from __future__ import annotations

from dataclasses import dataclass, field

from nfi_monitor.types import Alert, Change, Phase


@dataclass
class Judgement:
    """What one reading led to."""

    phase: Phase
    changes: list[tuple[Change, Alert]] = field(default_factory=list)
    derived: dict[str, float] = field(default_factory=dict)
    """Quantities that the detector adds to the reading: growth rates, decay."""
    failed: list[tuple[str, Exception]] = field(default_factory=list)
    """Parts of an alert (evidence, forecast, advice) that could not be made, and why."""
