"""Name the colours of severities and phases on a terminal, as rich writes them."""

from __future__ import annotations

from nfi_monitor.types import Phase, Severity

SEVERITY_STYLES = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}
PHASE_STYLES = {
    Phase.HEALTHY: "green",
    Phase.ABSORBING: "cyan",
    Phase.INFLATING: "yellow",
    Phase.IMMINENT: "bold red",
    Phase.SLINGSHOT: "bold magenta",
    Phase.RECOVERING: "blue",
}
