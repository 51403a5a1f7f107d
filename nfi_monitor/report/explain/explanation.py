"""Hold the explanation of an alert, and show it as text, in colours or as JSON."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.text import Text

from nfi_monitor.report import terminal, wording
from nfi_monitor.report.json_values import as_json
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism


class Seen(str, Enum):
    """Whether a quantity crossed its threshold in the steps that were searched."""

    CROSSED = "crossed"
    NOT_CROSSED = "not_crossed"
    NOT_MEASURED = "not_measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One quantity compared with one threshold over the steps that were searched.

    It crossed between the readings at steps ``after`` and ``at``.  ``after`` is None if there is no earlier
    reading; both are None if the crossing is not on record.  ``then`` is its value at ``at``, ``began`` its
    value when the alert began (as in the alert's evidence), ``now`` its value at the end, ``extreme`` the
    value nearest to the threshold or farthest beyond it.  All values are in
    the unit of ``threshold``.
    """

    quantity: str  # a name of nfi_monitor.quantities.QUANTITIES
    seen: Seen
    text: str  # the finding in words, without a full stop
    threshold: float | None = None
    after: int | None = None
    at: int | None = None
    back_at: int | None = None
    then: float | None = None
    now: float | None = None
    extreme: float | None = None
    supports_mechanism: bool = False  # the alert's mechanism is recognized by this quantity
    began: float | None = None

    @property
    def own(self) -> bool:
        """The old name of ``supports_mechanism``."""
        warnings.warn("Finding.own is now supports_mechanism.", DeprecationWarning, stacklevel=2)
        return self.supports_mechanism

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON's own types, no NaN. The key of ``supports_mechanism`` is ``own``."""
        values = asdict(self)
        values["own"] = values.pop("supports_mechanism")
        record: dict[str, Any] = as_json({**values, "seen": str(self.seen)})
        return record


@dataclass(frozen=True)
class Explanation:
    """The reasons for an alert and against other causes, for ``print`` and ``rich.print``."""

    alert: Alert
    window: tuple[int, int]
    """First and last optimizer step that were searched for causes."""
    why_window: str
    """Why the window begins where it does."""
    findings: tuple[Finding, ...]
    not_visible: tuple[str, ...]
    """What the monitor could not measure, each with the reason."""
    follows: str
    """What happened after the alert, or what to expect."""
    advice: str | None

    def of(self, seen: Seen) -> tuple[Finding, ...]:
        """Return the findings with this status, in their order."""
        return tuple(finding for finding in self.findings if finding.seen is seen)

    def title(self) -> str:
        """Return the alert's id, its steps and its mechanism with the confidence."""
        alert = self.alert
        if alert.state is AlertState.FIRING:
            steps = f"since step {alert.first_step:,}"
        elif alert.first_step == alert.last_step:
            steps = f"step {alert.first_step:,}"
        else:
            steps = f"steps {alert.first_step:,}–{alert.last_step:,}"
        if alert.mechanism is Mechanism.UNKNOWN:
            return f"{alert.id}, {steps}"
        name = wording.mechanism_name(alert.mechanism)
        return f"{alert.id}, {steps} ({name}, confidence {100 * alert.confidence:.0f}%)"

    def lines(self) -> list[tuple[str, str]]:
        """Return the paragraphs as (heading, text), in the order they are read."""
        first, last = self.window
        crossed = self.of(Seen.CROSSED)
        unknown = self.alert.mechanism is Mechanism.UNKNOWN
        own = [finding.text for finding in crossed if finding.supports_mechanism or unknown]
        other = [finding.text for finding in crossed if not (finding.supports_mechanism or unknown)]
        missing = [finding.text for finding in self.of(Seen.NOT_CROSSED)]
        lines = [("Steps searched", f"steps {first:,}–{last:,}, {self.why_window}.")]
        if unknown and self.alert.kind is not AlertKind.NON_FINITE:
            lines.append(("Cause", "Unknown: no sign of a mechanism that the monitor knows came before it."))
        lines.append(("Crossed", _sentence(own) if own else "nothing in these readings."))
        if other:
            lines.append(("Also crossed", _sentence(other)))
        if missing:
            lines.append(("Did not cross", _sentence(missing)))
        if self.not_visible:
            lines.append(("Not measured", _sentence(self.not_visible)))
        lines.append(("What follows", self.follows))
        if self.advice:
            lines.append(("What to do", self.advice))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON's own types, no NaN."""
        alert = self.alert.to_json()
        keys = ("id", "kind", "severity", "state", "first_step", "last_step", "mechanism", "confidence")
        record: dict[str, Any] = as_json(
            {
                **{key: alert[key] for key in keys},
                "window": list(self.window),
                **{str(seen): [finding.to_json() for finding in self.of(seen)] for seen in Seen},
                "not_visible": list(self.not_visible),
                "follows": self.follows,
                "advice": self.advice,
                "text": str(self),
            }
        )
        return record

    def __str__(self) -> str:
        return "\n".join([self.title() + ".", *(f"{what}: {text}" for what, text in self.lines())])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        say = terminal.cleaner(options.ascii_only)
        yield Text(say(self.title()), style="bold")
        for what, text in self.lines():
            yield Padding(Text.assemble((f"{what}: ", "dim"), say(text)), (0, 0, 0, 2))


def _sentence(parts: Sequence[str]) -> str:
    return "; ".join(parts) + "."
