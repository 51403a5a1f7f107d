"""Send readings and alerts to the loggers of a framework, and alerts to services that notify people.

A run directory keeps everything.  These sinks send less: scalars every few steps, and an alert when it
begins, becomes more severe, or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nfi_monitor.report import wording
from nfi_monitor.report.sink import Sink, SinkBase
from nfi_monitor.types import Alert, Change, Phase, Reading, Severity

TITLE = 63  # characters; wandb refuses longer titles
_PHASES = {phase: index for index, phase in enumerate(Phase)}


class ScalarLog(SinkBase):
    """Call ``log({"nfi/<quantity>": value, "nfi/phase": 0 … 5}, step)`` at most every ``every`` steps.

    A change of phase is logged at once, whatever ``every`` is.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], every: int = 1) -> None:
        self._log = log
        self._every = every
        self._last: tuple[int, Phase] | None = None

    def reading(self, reading: Reading, phase: Phase) -> None:
        if self._last is not None and phase is self._last[1] and reading.step - self._last[0] < self._every:
            return
        self._last = (reading.step, phase)
        values = {f"nfi/{name}": value for name, value in reading.values.items()}
        self._log({**values, "nfi/phase": float(_PHASES[phase])}, reading.step)


class AlertLog(SinkBase):
    """Call ``notify(alert, change)`` when an alert begins, becomes more severe, or ends."""

    def __init__(self, notify: Callable[[Alert, Change], None]) -> None:
        self._notify = notify
        self._severity: dict[str, int] = {}  # id of an alert → rank of the severity last notified

    def alert(self, alert: Alert, change: Change) -> None:
        before = self._severity.get(alert.id, -1)
        self._severity[alert.id] = alert.severity.rank
        if change is Change.UPDATE and alert.severity.rank <= before:
            return
        self._notify(alert, change)


def notifiers(services: Iterable[str]) -> list[Sink]:
    """Return one sink for each service that can notify people ("wandb", "trackio"); ignore the others.

    Each has its own sink, so that a service that fails is dropped alone.
    """
    return [AlertLog(_NOTIFY[name]) for name in dict.fromkeys(services) if name in _NOTIFY]


def _wandb(alert: Alert, change: Change) -> None:
    import wandb

    if change is not Change.END and wandb.run is not None:  # None: wandb is disabled
        level = {Severity.INFO: "INFO", Severity.WARNING: "WARN", Severity.CRITICAL: "ERROR"}
        wandb.run.alert(title=_title(alert), text=_text(alert), level=level[alert.severity])


def _trackio(alert: Alert, change: Change) -> None:
    import trackio

    if change is not Change.END:
        level = {Severity.INFO: "info", Severity.WARNING: "warn", Severity.CRITICAL: "error"}
        trackio.alert(title=_title(alert), text=_text(alert), level=trackio.AlertLevel(level[alert.severity]))


_NOTIFY = {"wandb": _wandb, "trackio": _trackio}


def _title(alert: Alert) -> str:
    return f"nfi step {alert.last_step:,} {alert.id}: {wording.kind_in_words(alert.kind)}"[:TITLE]


def _text(alert: Alert) -> str:
    return "\n".join([wording.alert_in_words(alert), *alert.advice])
