"""What an explanation of an alert holds, and how it is shown: as text, in colours, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.text import Text

from nfi_monitor.report import terminal, wording
from nfi_monitor.report.json_values import plain
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism


class Seen(str, Enum):
    CROSSED = "crossed"
    NOT_CROSSED = "not_crossed"
    NOT_MEASURED = "not_measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One quantity, held against one threshold over the steps that were looked at.

    ``after`` and ``at`` are the readings between which it crossed (``after`` None: there is none before
    ``at``; both None: not on record), ``then`` and ``now`` its value at ``at`` and at the end, ``extreme``
    the value nearest to the threshold, or farthest beyond it.  Values in the unit of ``threshold``.
    """

    quantity: str  # a name of nfi_monitor.quantities.QUANTITIES
    seen: Seen
    text: str  # the same in plain words
    threshold: float | None = None
    after: int | None = None
    at: int | None = None
    back_at: int | None = None
    then: float | None = None
    now: float | None = None
    extreme: float | None = None
    own: bool = False  # one of those that the alert's mechanism is known by

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = plain({**asdict(self), "seen": str(self.seen)})
        return record


@dataclass(frozen=True)
class Explanation:
    """What :mod:`nfi_monitor.report.explain.compose` found. ``print`` and ``rich.print`` show it."""

    alert: Alert
    window: tuple[int, int]
    """First and last optimizer step that were looked at for causes."""
    why_window: str
    findings: tuple[Finding, ...]
    not_visible: tuple[str, ...]
    follows: str
    advice: str | None

    def of(self, seen: Seen) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.seen is seen)

    def title(self) -> str:
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
        """(what, text), in the order they are read."""
        first, last = self.window
        crossed = self.of(Seen.CROSSED)
        unknown = self.alert.mechanism is Mechanism.UNKNOWN
        own = [finding.text for finding in crossed if finding.own or unknown]
        other = [finding.text for finding in crossed if not (finding.own or unknown)]
        missing = [finding.text for finding in self.of(Seen.NOT_CROSSED)]
        lines = [("Looked at", f"steps {first:,}–{last:,}, {self.why_window}.")]
        if unknown and self.alert.kind is not AlertKind.NON_FINITE:
            lines.append(("Cause", "No mechanism known to the monitor preceded it."))
        lines.append(("What crossed", _sentence(own) if own else "nothing that is on record."))
        if other:
            lines.append(("Also crossed", _sentence(other)))
        if missing:
            lines.append(("What was not seen", _sentence(missing)))
        if self.not_visible:
            lines.append(("Not visible", _sentence(self.not_visible)))
        lines.append(("What follows", self.follows))
        if self.advice:
            lines.append(("What to do", self.advice))
        return lines

    def to_json(self) -> dict[str, Any]:
        """A dict of plain types, no NaN."""
        alert = self.alert.to_json()
        keys = ("id", "kind", "severity", "state", "first_step", "last_step", "mechanism", "confidence")
        record: dict[str, Any] = plain(
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
        say = terminal.shown(options.ascii_only)
        yield Text(say(self.title()), style="bold")
        for what, text in self.lines():
            yield Padding(Text.assemble((f"{what}: ", "dim"), say(text)), (0, 0, 0, 2))


def _sentence(parts: Sequence[str]) -> str:
    return "; ".join(parts) + "."
